"""What a fold costs each skill, on the rows that no regression saw: loss over the owner's, or KL from the owner."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from polymerge.divergence import kl

if TYPE_CHECKING:
    from polymerge.methods._layers import LayerFold


def lag(fold: "LayerFold", head: Tensor) -> list[float]:
    """`excess`; where no token follows a scored position, `divergence`."""
    return excess(fold, head) if fold.texts.scored[:-1].any() else divergence(fold, head)


@torch.no_grad()
def excess(fold: "LayerFold", head: Tensor) -> list[float]:
    """Loss over the owner's in bits per byte, by expert; `head` (vocab, width)."""
    sums = torch.zeros(len(fold.experts), 2, dtype=torch.float64)
    scored = fold.texts.scored[:-1]
    for rows in _held_out(fold):
        following = fold.texts.tokens[rows, 1:].to(fold.device)
        losses = [
            F.cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="none")[:, scored].sum(1).cpu()
            for logits in (F.linear(fold.normalised(rows), head), fold.teacher(rows))
        ]
        lost, count = (losses[0] - losses[1]).double(), torch.full_like(losses[0], int(scored.sum())).double()
        sums.index_add_(0, fold.texts.owner[rows], torch.stack([lost, count], dim=1))
    per_token = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()
    return [n / math.log(2) / b for n, b in zip(per_token, fold.texts.bytes_per_token, strict=True)]


@torch.no_grad()
def divergence(fold: "LayerFold", head: Tensor) -> list[float]:
    """KL(owner ‖ target) in nats at the scored positions, by expert; inf if not finite. `head` (vocab, width)."""
    sums = torch.zeros(len(fold.experts), 2, dtype=torch.float64)
    for rows in _held_out(fold):
        found = nats(fold, rows, fold.normalised(rows), head).double().cpu()
        sums.index_add_(0, fold.texts.owner[rows], torch.stack([found, torch.ones_like(found)], dim=1))
    mean = sums[:, 0] / sums[:, 1].clamp_min(1)
    return torch.where(mean.isfinite(), mean, torch.inf).tolist()


def nats(fold: "LayerFold", rows: Tensor, seen: Tensor, head: Tensor) -> Tensor:
    """KL(owner ‖ target) in nats (row,), mean over scored positions; `seen` (row, time, width): the normed stream."""
    scored = fold.texts.scored
    with torch.no_grad():
        goal = fold.teacher(rows)[:, scored]
    return kl(F.linear(seen[:, scored], head), goal).mean(-1)


def _held_out(fold: "LayerFold") -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.nonzero(~fold.texts.fit).flatten().split(fold.batch)
    return parts
