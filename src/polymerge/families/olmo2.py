"""OLMo 2 (OLMo team 2025): norms behind attention and MLP in place of before, queries and keys normalised as one."""

from typing import Any

from polymerge.families import _gated
from polymerge.model.spec import Family, Spec, stored

_AT = "model.layers.{layer}."
TENSORS = (
    *(row for row in _gated.TENSORS if row.roles[0] not in ("norm1.weight", "norm2.weight")),
    stored(_AT + "self_attn.q_norm.weight", "(head hd)", "q_norm_all.weight"),
    stored(_AT + "self_attn.k_norm.weight", "(kvhead hd)", "k_norm_all.weight"),
    stored(_AT + "post_attention_layernorm.weight", "resid", "o_norm.weight"),
    stored(_AT + "post_feedforward_layernorm.weight", "resid", "down_norm.weight"),
    *_gated.QKV_BIAS,
    *_gated.O_BIAS,
)


def read(config: Any) -> Spec:
    """The spec of a config of OLMo 2, or of 3 but for its layers."""
    return _gated.read(config, {"qk_norm_all", "read_raw", "write_norms"} | _gated.biases(config))


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    tensors=TENSORS,
    read=read,
    claimed=_gated.CLAIMED | {"attention_bias"},
    tiny={**_gated.TINY, "pad_token_id": None},
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)
