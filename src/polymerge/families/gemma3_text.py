"""Gemma 3 without vision (Google DeepMind 2025): Gemma 2 with normalised queries and keys, in most layers a window."""

from typing import Any

from polymerge.errors import FamilyError
from polymerge.families import _gated, gemma2
from polymerge.families.gemma import norms_less_one
from polymerge.model.spec import Family, Spec


def _read(config: Any) -> Spec:
    if config.attn_logit_softcapping is not None:  # transformers has the key, and no such cap
        raise FamilyError(f"config.json: attn_logit_softcapping is {config.attn_logit_softcapping}; expected null")
    return gemma2.read(config, {"qk_norm"}, "q_norm")


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    tensors=gemma2.TENSORS + norms_less_one(_gated.QK_NORM),
    read=_read,
    claimed=gemma2.CLAIMED | {"rope_local_base_freq", "sliding_window_pattern"},
    tiny={
        **_gated.TINY, "hidden_size": 64, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)  # fmt: skip
