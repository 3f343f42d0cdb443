"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama whose queries, keys and values, and gates and ups, are stored as one."""

from typing import Any

from polymerge.families import _gated
from polymerge.model.spec import Family, Spec, stored

_AT = "model.layers.{layer}."
_FUSED = ("q.weight", "k.weight", "v.weight", "gate.weight", "up.weight")


def _read(config: Any) -> Spec:
    return _gated.read(config, set(), window=config.sliding_window)


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    tensors=(
        *(row for row in _gated.TENSORS if row.roles[0] not in _FUSED),
        stored(_AT + "self_attn.qkv_proj.weight", "(head hd | kvhead hd | kvhead hd) resid", *_FUSED[:3]),
        stored(_AT + "mlp.gate_up_proj.weight", "(ff | ff) resid", *_FUSED[3:]),
    ),
    read=_read,
    claimed=_gated.CLAIMED
    | {
        "embd_pdrop", "original_max_position_embeddings", "partial_rotary_factor", "resid_pdrop", "sliding_window",
        # in published configs, and read by nothing; a bias that they promised would be refused as a tensor
        "attention_bias", "full_attn_mod", "interpolate_factor", "lm_head_bias", "mlp_bias",
    },
    tiny={**_gated.TINY, "sliding_window": 6, "pad_token_id": 0},
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)  # fmt: skip
