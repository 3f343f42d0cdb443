"""Blockwise local refinement: after a block's closed-form solution, Adam on that block alone towards the same targets.

No end-to-end backward pass: the block reads the target's own states, its loss is the error of the slices that the next
block reads, and only one block is in memory. The head is refined by KL to the owner, a convex problem.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from polymerge.model import decoder

if TYPE_CHECKING:
    from polymerge.methods._layers import LayerFold


@dataclass(frozen=True)
class Refine:
    """`steps` of `rows` texts per block at peak rate `lr`, and `head_steps` at `head_lr` for the head; 0: none."""

    steps: int = 60
    rows: int = 16
    lr: float = 1e-3
    head_steps: int = 60
    head_lr: float = 1e-3


def block(fold: "LayerFold", before: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer refined towards the slices' goals; `before` (row, time, width) is the stream that it reads."""
    power = [fold.goal(k, torch.arange(len(before)))[0].pow(2).mean() for k in range(len(fold.slices))]
    params = {role: w.clone().requires_grad_(not role.startswith("norm")) for role, w in weights.items()}

    def loss(rows: Tensor) -> Tensor:
        out = decoder.layer(fold.target, params, before[rows].to(fold.device)).out
        total = out.new_zeros(())
        for k, part in enumerate(fold.slices):
            goal, weight = fold.goal(k, rows)
            error = ((out[..., part] - goal).pow(2).mean(-1) * weight).mean() / power[k].clamp_min(1e-12)
            total = total + fold.balance[k] * error
        return total

    _descend(fold, [p for p in params.values() if p.requires_grad], loss, fold.refine.steps, fold.refine.lr)
    return {role: p.detach() for role, p in params.items()}


def head(fold: "LayerFold", weight: Tensor) -> Tensor:
    """The head (vocab, width) refined by KL(owner ‖ target) on the fitted rows."""
    moved, scored = weight.clone().requires_grad_(), fold.texts.scored

    def loss(rows: Tensor) -> Tensor:
        with torch.no_grad():
            seen = fold.normalised(rows)[:, scored].flatten(0, 1)
            goal = fold.teacher(rows)[:, scored].flatten(0, 1).log_softmax(-1)
        ours = F.linear(seen, moved).log_softmax(-1)
        return F.kl_div(ours, goal, log_target=True, reduction="batchmean")

    _descend(fold, [moved], loss, fold.refine.head_steps, fold.refine.head_lr)
    return moved.detach()


def _descend(
    fold: "LayerFold", params: Iterable[Tensor], loss: Callable[[Tensor], Tensor], steps: int, peak: float
) -> None:
    """Adam over random rows of the fitted texts: linear warm-up over a tenth, linear decay to zero."""
    fitted = torch.nonzero(fold.texts.fit).flatten()
    optimiser = torch.optim.Adam(params, lr=peak, betas=(0.9, 0.99))
    for step in range(steps):
        rows = fitted[torch.randperm(len(fitted), generator=fold.generator)[: fold.refine.rows]]
        done = (step + 1) / steps
        for group in optimiser.param_groups:
            group["lr"] = peak * min(done / 0.1, (1 - done) / 0.9 + 1e-3)
        optimiser.zero_grad()
        with torch.enable_grad():
            loss(rows).backward()
        optimiser.step()
