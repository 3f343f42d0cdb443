"""StableLM and StableLM 2 (Bellagente et al. 2024): Llama with LayerNorm, and RoPE on a part of each head."""

from typing import Any

from polymerge.errors import FamilyError
from polymerge.families import _gated
from polymerge.model.spec import Family, Spec


def _read(config: Any) -> Spec:
    for key in ("qk_layernorm", "use_parallel_residual"):
        if getattr(config, key):
            raise FamilyError(f"config.json: {key} is true; only false is supported")
    features = {"qkv_bias"} if config.use_qkv_bias else set()
    return _gated.read(config, features, layer_norm=config.layer_norm_eps)


FAMILY = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    tensors=_gated.TENSORS + _gated.NORM_BIAS + _gated.QKV_BIAS,
    read=_read,
    claimed=_gated.CLAIMED
    | {
        "hidden_dropout", "layer_norm_eps", "partial_rotary_factor", "qk_layernorm", "use_parallel_residual",
        "use_qkv_bias",
    },
    tiny={**_gated.TINY, "use_qkv_bias": True},
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)  # fmt: skip
