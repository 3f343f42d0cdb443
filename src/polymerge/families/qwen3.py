"""Qwen3 (Yang et al. 2025): Qwen2 without biases, queries and keys normalised per head."""

from typing import Any

from polymerge.families import _gated
from polymerge.families.qwen2 import no_sliding_layers
from polymerge.model.spec import Family, Spec


def _read(config: Any) -> Spec:
    no_sliding_layers(config)
    return _gated.read(config, {"qk_norm"} | _gated.biases(config))


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=_gated.TENSORS + _gated.QKV_BIAS + _gated.O_BIAS + _gated.QK_NORM,
    read=_read,
    claimed=_gated.CLAIMED
    | {"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    tiny={**_gated.TINY, "head_dim": 16},
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
    write=_gated.write,
    qk_norm=True,
)
