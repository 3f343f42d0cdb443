"""Rotary frequencies of a Hugging Face config (Su et al. 2021), by transformers' own formulas."""

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from polymerge.errors import FamilyError

KNOWN = ("default", "linear", "llama3", "yarn", "longrope")


def parameters(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """The rotary parameters of a config; of one of `layer_types`, by default full attention, where they differ."""
    rope: dict[str, Any] = config.rope_parameters or {}
    return dict(rope.get(layer_type or "full_attention", rope))


def partial(config: Any) -> float:
    """The part of a head that a config asks to be rotated; families that do not claim the key rotate all of it."""
    return min(float(one.get("partial_rotary_factor", 1.0)) for one in _all(config))


def reach(config: Any, positions: int) -> int:
    """Up to how many positions of so many the `frequencies` hold."""
    return min(
        one["original_max_position_embeddings"] if one.get("rope_type") == "longrope" else positions
        for one in _all(config)
    )


def _all(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of every kind of layer."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return [one for one in rope.values() if isinstance(one, dict)] or [rope]


def frequencies(config: Any, head_size: int, layer_type: str | None = None) -> tuple[tuple[float, ...], float]:
    """Radians per token of each rotary pair, and the factor on cos and sin, as `parameters`.

    Of LongRoPE (Ding et al. 2024) those of texts up to `original_max_position_embeddings`. Raises FamilyError for
    scalings whose frequencies change with every length.
    """
    rope = parameters(config, layer_type)
    kind = rope["rope_type"]
    if kind not in KNOWN:
        raise FamilyError(
            f"config.json: rope_type {kind!r} depends on the text's length; supported: {', '.join(KNOWN)}. "
            "Merge a variant of the model without it"
        )
    if kind != "default":
        which = (layer_type or "full_attention") if "full_attention" in config.rope_parameters else None
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=which)
        return tuple(inverse.tolist()), float(scale)
    rotary = int(head_size * rope.get("partial_rotary_factor", 1.0))
    inverse = 1.0 / (rope["rope_theta"] ** (torch.arange(0, rotary, 2, dtype=torch.float) / rotary))
    return tuple(inverse.tolist()), 1.0
