"""Gemma (Google DeepMind 2024; not Gemma 2 and later): embeddings times the root of the width, norms stored less 1."""

import math
from dataclasses import replace
from typing import Any

from polymerge.errors import FamilyError
from polymerge.families import _gated
from polymerge.model.spec import Family, Spec


def _read(config: Any) -> Spec:
    if config.use_bidirectional_attention:
        raise FamilyError("config.json: use_bidirectional_attention is true; only causal models can be merged")
    spec = _gated.read(config, _gated.biases(config))
    return replace(spec, factors=(("embed.weight", math.sqrt(spec.width)),))


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    tensors=tuple(replace(row, plus=1.0) if "norm" in row.name else row for row in _gated.TENSORS)
    + _gated.QKV_BIAS
    + _gated.O_BIAS,
    read=_read,
    # transformers takes any activation for the tanh approximation of GELU, whatever hidden_activation says
    claimed=_gated.CLAIMED | {"attention_bias", "hidden_activation", "use_bidirectional_attention"},
    tiny={**_gated.TINY, "hidden_size": 64, "head_dim": 16},  # a square: its root is exact in every dtype
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)
