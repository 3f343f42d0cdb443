"""StarCoder2 (Lozhkov et al. 2024): LayerNorm, RoPE, grouped KV heads, a sliding window, plain MLP, biases."""

from dataclasses import replace
from typing import Any

from polymerge.families import _gated
from polymerge.model.spec import Family, Spec, stored

_MLP = "model.layers.{layer}.mlp."


def _read(config: Any) -> Spec:
    features = {"qkv_bias", "o_bias", "mlp_bias"} if config.use_bias else set()
    spec = _gated.read(config, features, window=config.sliding_window, layer_norm=config.norm_epsilon)
    return replace(spec, gated=False)


FAMILY = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    tensors=(
        *(row for row in _gated.TENSORS if ".mlp." not in row.name),
        *_gated.NORM_BIAS,
        *_gated.QKV_BIAS,
        *_gated.O_BIAS,
        stored(_MLP + "c_fc.weight", "ff resid", "up.weight"),
        stored(_MLP + "c_fc.bias", "ff", "up.bias", when="mlp_bias"),
        stored(_MLP + "c_proj.weight", "resid ff", "down.weight"),
        stored(_MLP + "c_proj.bias", "resid", "down.bias", when="mlp_bias"),
    ),
    read=_read,
    claimed=_gated.CLAIMED
    | {
        "embedding_dropout", "norm_epsilon", "residual_dropout", "sliding_window", "use_bias",
        # in published configs, and read by nothing
        "activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon", "mlp_type", "norm_type",
        "scale_attention_softmax_in_fp32", "scale_attn_weights",
    },
    tiny={**_gated.TINY, "sliding_window": 6},
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)  # fmt: skip
