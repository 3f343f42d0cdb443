"""OLMo 3 (OLMo team 2025): OLMo 2 with a sliding window in three layers of four, and a rotation of its own there."""

from typing import Any

from polymerge.families import _gated, olmo2
from polymerge.model.spec import Family, Spec


def _read(config: Any) -> Spec:
    return _gated.by_layer_type(config, olmo2.read(config))


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    tensors=olmo2.TENSORS,
    read=_read,
    claimed=_gated.CLAIMED | {"attention_bias", "layer_types", "sliding_window"},
    tiny={
        **olmo2.FAMILY.tiny, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
    },
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)  # fmt: skip
