"""Granite 3 (IBM 2024): Llama with a number that multiplies embeddings, attention, each layer's output and logits."""

import math
from dataclasses import replace
from typing import Any

from polymerge.families import _gated
from polymerge.model.spec import Family, Spec


def _read(config: Any) -> Spec:
    spec = _gated.read(config, _gated.biases(config))
    factors = {
        "embed.weight": config.embedding_multiplier,
        "q.weight": config.attention_multiplier * math.sqrt(spec.head_size),  # where others divide by the root
        "o.weight": config.residual_multiplier,
        "down.weight": config.residual_multiplier,
        "head.weight": 1 / config.logits_scaling,
    }
    factors |= {role.replace("weight", "bias"): factors[role] for role in ("q.weight", "o.weight", "down.weight")}
    return replace(spec, factors=tuple(factors.items()))


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    tensors=_gated.TENSORS + _gated.QKV_BIAS + _gated.O_BIAS + _gated.MLP_BIAS,
    read=_read,
    claimed=_gated.CLAIMED
    | {
        "attention_bias", "attention_multiplier", "embedding_multiplier", "logits_scaling", "mlp_bias",
        "residual_multiplier",
    },
    tiny={
        **_gated.TINY,
        "attention_multiplier": 0.25, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
    },
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)  # fmt: skip
