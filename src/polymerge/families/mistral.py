"""Mistral (Jiang et al. 2023): Llama with a sliding attention window."""

from typing import Any

from polymerge.families import _gated
from polymerge.model.spec import Family, Spec


def _read(config: Any) -> Spec:
    return _gated.read(config, set(), window=config.sliding_window)


def _write(spec: Spec) -> dict[str, Any]:
    return {**_gated.write(spec), "sliding_window": None}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    tensors=_gated.TENSORS,
    read=_read,
    claimed=_gated.CLAIMED | {"sliding_window"},
    tiny={**_gated.TINY, "head_dim": 12, "sliding_window": 6},
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
    write=_write,
)
