"""Gemma (Google DeepMind 2024): Llama with embeddings times the root of the width, and norms stored less 1."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from polymerge.errors import FamilyError
from polymerge.families import _gated
from polymerge.model.spec import Family, Spec, Stored


def norms_less_one(rows: Iterable[Stored]) -> tuple[Stored, ...]:
    """The rows, with what the norms lack."""
    return tuple(replace(row, plus=1.0) if "norm" in row.name else row for row in rows)


def root_of_width(spec: Spec) -> tuple[str, float]:
    """The factor on embeddings."""
    return ("embed.weight", math.sqrt(spec.width))


def causal(config: Any) -> None:
    """Refuse a model that looks ahead."""
    if config.use_bidirectional_attention:
        raise FamilyError("config.json: use_bidirectional_attention is true; only causal models can be merged")


def _read(config: Any) -> Spec:
    causal(config)
    spec = _gated.read(config, _gated.biases(config))
    return replace(spec, factors=(root_of_width(spec),))


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    tensors=norms_less_one(_gated.TENSORS) + _gated.QKV_BIAS + _gated.O_BIAS,
    read=_read,
    # transformers takes the tanh approximation of GELU, whatever hidden_activation says
    claimed=_gated.CLAIMED | {"attention_bias", "hidden_activation", "use_bidirectional_attention"},
    tiny={**_gated.TINY, "hidden_size": 64, "head_dim": 16},  # a square: its root is exact in every dtype
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)
