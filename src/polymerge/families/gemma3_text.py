"""Gemma 3 without vision (Google DeepMind 2025): norms behind attention and MLP too, short windows in most layers."""

import math
from dataclasses import replace
from typing import Any

from polymerge.errors import FamilyError
from polymerge.families import _gated
from polymerge.families.gemma import causal, norms_less_one, root_of_width
from polymerge.model.spec import Family, Spec, stored

_AT = "model.layers.{layer}."


def _read(config: Any) -> Spec:
    causal(config)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key) is not None:
            raise FamilyError(f"config.json: {key} is {getattr(config, key)}; only null is supported")
    features = {"qk_norm", "write_norms"} | _gated.biases(config)
    spec = _gated.by_layer_type(config, _gated.read(config, features, activation=config.hidden_activation))
    # Scores are divided by the root of another number than the head size: queries make up for it, behind their norm.
    scores = ("q_norm.weight", math.sqrt(spec.head_size / config.query_pre_attn_scalar))
    return replace(spec, factors=(root_of_width(spec), scores))


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    tensors=norms_less_one((
        *(row for row in _gated.TENSORS if row.roles != ("norm2.weight",)),
        stored(_AT + "post_attention_layernorm.weight", "resid", "o_norm.weight"),
        stored(_AT + "pre_feedforward_layernorm.weight", "resid", "norm2.weight"),
        stored(_AT + "post_feedforward_layernorm.weight", "resid", "down_norm.weight"),
        *_gated.QK_NORM,
    ))
    + _gated.QKV_BIAS
    + _gated.O_BIAS,
    read=_read,
    claimed=_gated.CLAIMED
    | {
        "_sliding_window_pattern", "attention_bias", "attn_logit_softcapping", "cache_implementation",
        "final_logit_softcapping", "hidden_activation", "layer_types", "query_pre_attn_scalar", "rope_local_base_freq",
        "sliding_window", "sliding_window_pattern", "use_bidirectional_attention",
    },
    tiny={
        **_gated.TINY, "hidden_size": 64, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)  # fmt: skip
