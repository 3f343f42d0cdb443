"""Llama (Touvron et al. 2023; Llama 3 with rope scaling)."""

from typing import Any

from polymerge.families import _gated
from polymerge.model.spec import Family, Spec


def _read(config: Any) -> Spec:
    return _gated.read(config, _gated.biases(config))


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=_gated.TENSORS + _gated.QKV_BIAS + _gated.O_BIAS + _gated.MLP_BIAS,
    read=_read,
    claimed=_gated.CLAIMED | {"attention_bias", "mlp_bias"},
    tiny=_gated.TINY,
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
    write=_gated.write,
    divides_width=True,
)
