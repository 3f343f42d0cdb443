"""Gemma 2 (Google DeepMind 2024): norms behind attention and MLP too, windows in half of the layers, capped scores."""

import math
from dataclasses import replace
from typing import Any

from polymerge.families import _gated
from polymerge.families.gemma import causal, norms_less_one, root_of_width
from polymerge.model.spec import Family, Spec, Stored, stored

_AT = "model.layers.{layer}."
TENSORS: tuple[Stored, ...] = norms_less_one(
    [
        *(row for row in _gated.TENSORS if row.roles != ("norm2.weight",)),
        stored(_AT + "post_attention_layernorm.weight", "resid", "o_norm.weight"),
        stored(_AT + "pre_feedforward_layernorm.weight", "resid", "norm2.weight"),
        stored(_AT + "post_feedforward_layernorm.weight", "resid", "down_norm.weight"),
        *_gated.QKV_BIAS,
        *_gated.O_BIAS,
    ]
)
CLAIMED = _gated.CLAIMED | {
    "_sliding_window_pattern", "attention_bias", "attn_logit_softcapping", "cache_implementation",
    "final_logit_softcapping", "hidden_activation", "layer_types", "query_pre_attn_scalar", "sliding_window",
    "use_bidirectional_attention",
}  # fmt: skip


def read(config: Any, features: set[str], queries: str) -> Spec:
    """The spec of a Gemma 2 or 3; `queries`: the role behind which nothing changes the size of queries.

    Scores are divided by the root of another number than the head size, for which that role makes up.
    """
    causal(config)
    found = features | {"write_norms"} | _gated.biases(config)
    spec = _gated.by_layer_type(config, _gated.read(config, found, activation=config.hidden_activation))
    scale = math.sqrt(spec.head_size / config.query_pre_attn_scalar)
    return replace(
        spec, score_cap=config.attn_logit_softcapping, logit_cap=config.final_logit_softcapping,
        factors=(root_of_width(spec), (f"{queries}.weight", scale), (f"{queries}.bias", scale)),
    )  # fmt: skip


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    tensors=TENSORS,
    read=lambda config: read(config, set(), "q"),
    claimed=CLAIMED,
    tiny={
        **_gated.TINY, "hidden_size": 64, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)  # fmt: skip
