"""Attention heads of one model inside the heads of another: sizes, rotary pairs, KV groups.

A rotary pair keeps its meaning only on a pair of (nearly) the same frequency. A head of size h goes into a head of
size H without loss when H's pairs contain h's frequencies; pairs that the source does not rotate (learned positions,
partial RoPE) go to the slowest pairs, which hardly turn within a text. Scores are divided by √H in the target
instead of √h, so queries and keys are scaled by (H / h)^¼ each; and by a scaling's factor on cos and sin (YaRN's and
LongRoPE's), which the source applies to what it rotates and the target to all.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from polymerge.model.spec import Spec


@dataclass(frozen=True)
class Placement:
    """Where coordinate j of a source head lives in a target head, for queries/keys (`rotary`) and values (`plain`)."""

    rotary: tuple[int, ...]
    plain: tuple[int, ...]
    size: int
    scale: tuple[float, ...]
    worst_angle: float

    def place(self, x: Float[Tensor, "... head hd"], *, value: bool) -> Float[Tensor, "... head target"]:
        """Source heads inside target heads, zero elsewhere."""
        out = x.new_zeros(*x.shape[:-1], self.size)
        out[..., list(self.plain if value else self.rotary)] = (
            x if value else x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        )
        return out


def placement(source: Spec, target: Spec, span: float = 64.0) -> Placement:
    """Assign source pairs to target pairs so that phases stay closest over `span` tokens.

    `worst_angle` is the largest drift in radians over `span` tokens (0: exact).
    """
    pairs = source.head_size // 2
    rotated = len(source.frequencies)
    turns = torch.tensor([*source.frequencies, *[0.0] * (pairs - rotated)], dtype=torch.float64)
    slots = torch.tensor(target.frequencies, dtype=torch.float64)
    drift = (turns[:, None] - slots[None]).abs() * span
    rows, columns = linear_sum_assignment(drift.clamp_max(math.pi).pow(2).numpy())
    half = target.head_size // 2
    slot = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    rotary = [0] * source.head_size
    for pair in range(pairs):
        first, second = (pair, pair + rotated) if pair < rotated else (2 * pair, 2 * pair + 1)
        rotary[first], rotary[second] = slot[pair], slot[pair] + half
    plain = (target.head_size / source.head_size) ** 0.25 / target.rope_scale
    scale = [plain * (source.rope_scale if i < 2 * rotated else 1.0) for i in range(source.head_size)]
    return Placement(
        rotary=tuple(rotary),
        plain=tuple(range(source.head_size)),
        size=target.head_size,
        scale=tuple(scale),
        worst_angle=float(drift[rows, columns].max()),
    )


def expand_groups(x: Float[Tensor, "... kvhead hd"], source_ratio: int, ratio: int) -> Float[Tensor, "... group hd"]:
    """KV heads repeated so that each serves `ratio` query heads (a divisor of the source's ratio)."""
    return x.repeat_interleave(source_ratio // ratio, dim=-2)
