"""Blockwise local refinement: after a block's closed-form solution, Adam on that block alone towards the same targets.

No end-to-end backward pass: the block reads the target's own states, its loss is the error of the slices that the next
block reads, and only one block is in memory. The head is refined by KL to the owner, a convex problem; then the last
block and the head together, since KL can be read off them without another block.

A block is never left worse than its closed form by that loss on rows held out (KL may still grow):
Adam's first steps move every weight by the rate, whatever the gradient, so a rate that gains much where a block was cut
down ruins one that was solved exactly. Such a descent is taken back and tried again at a fifth of the rate.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polymerge.methods import _judge
from polymerge.model import decoder

if TYPE_CHECKING:
    from polymerge.methods._layers import LayerFold

BACK_OFF, TRIES = 5.0, 3
LAST = 3
"""The last layer gets so many times the steps of the others: its loss is the very one that counts."""
TILT = 10.0
REPEATED = 4
"""Times that the rows of an expert with fewer of them come at most: few texts are soon known by heart."""

Loss = Callable[..., Tensor]
"""(tensors by role, indices of rows, *, fitted=True) -> a scalar; `fitted`: rows held out do not count."""


@dataclass(frozen=True)
class Refine:
    """`steps` of `rows` texts per block at peak rate `lr`, and `head_steps` at `head_lr` for the head; 0: none.

    These are for two experts (or one); more share the rows of a step, and get as many more steps.
    Fewer where they would go over the fitted texts more than `passes` times: few texts are soon known by heart.
    """

    steps: int = 60
    rows: int = 16
    lr: float = 1e-3
    head_steps: int = 60
    head_lr: float = 1e-3
    passes: float = math.inf

    def most(self, steps: int, texts: int, experts: int) -> int:
        """Of so many steps for two experts, what these experts get, as far as so many texts are good for it."""
        return math.ceil(min(steps * max(1.0, experts / 2), self.passes * texts / self.rows))


def block(fold: "LayerFold", before: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer refined towards the slices' goals; `before` (row, time, width) is the stream that it reads."""
    power = []
    for k in range(len(fold.slices)):
        parts = []
        for rows in fold.batches():
            goal, heed = fold.audible(fold.goal(k, rows)[0], fold.heed[rows].to(fold.device))
            parts.append((goal.pow(2).mean(-1) * heed).flatten())
        power.append(torch.cat(parts).mean())

    def loss(params: dict[str, Tensor], rows: Tensor, *, fitted: bool = True) -> Tensor:
        out = decoder.layer(fold.target, params, before[rows].to(fold.device)).out
        out, heed = fold.audible(out, fold.heed[rows].to(out))
        total = out.new_zeros(())
        for k, part in enumerate(fold.slices):
            goal, weight = fold.audible(*fold.goal(k, rows, fitted=fitted))
            error = ((out[..., part] - goal).pow(2).mean(-1) * heed * weight).mean() / power[k].clamp_min(1e-12)
            total = total + fold.balance[k] * error
        return total

    return _refined(fold, weights, loss, _steps(fold, fold.refine.steps), fold.refine.lr)


def head(fold: "LayerFold", weight: Tensor) -> Tensor:
    """The head (vocab, width) refined by KL(owner ‖ target) on the fitted rows."""

    def loss(params: dict[str, Tensor], rows: Tensor, *, fitted: bool = True) -> Tensor:  # noqa: ARG001  KL counts all positions
        return _judge.nats(fold, rows, fold.normalised(rows), params["head.weight"]).mean()

    steps = _steps(fold, fold.refine.head_steps)
    return _refined(fold, {"head.weight": weight}, loss, steps, fold.refine.head_lr)["head.weight"]


def ending(
    fold: "LayerFold", before: Tensor, weights: dict[str, Tensor], head: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The last layer and the head refined together by KL(owner ‖ target): nothing but the head reads what they write.

    `before` (row, time, width) is the stream that the layer reads. Skills that lag count more (`balanced`). Both are
    as they were if that KL on the rows held out does not fall.
    """
    say = torch.tensor(balanced(_judge.lag(fold, head)))

    def loss(params: dict[str, Tensor], rows: Tensor, *, fitted: bool = True) -> Tensor:  # noqa: ARG001  KL counts all positions
        out = decoder.layer(fold.target, params, before[rows].to(fold.device)).out
        nats = _judge.nats(fold, rows, decoder.rms(out, fold.target.eps), params["head.weight"])
        return (nats * say[fold.texts.owner[rows]].to(nats)).mean()

    steps = LAST * _steps(fold, fold.refine.steps)
    found = _refined(fold, weights | {"head.weight": head}, loss, steps, fold.refine.lr)
    return found, found.pop("head.weight")


def balanced(lag: Sequence[float], most: float = TILT) -> tuple[float, ...]:
    """Weights by which lagging skills count more: the square of their excess over the least, at most `most`."""
    least = max(min(lag), 1e-3)
    return tuple(min(most, max(1.0, max(e, 0.0) ** 2 / least**2)) for e in lag)


def _steps(fold: "LayerFold", asked: int) -> int:
    return fold.refine.most(asked, int(fold.texts.fit.sum()), len(fold.slices))


def _refined(fold: "LayerFold", start: dict[str, Tensor], loss: Loss, steps: int, rate: float) -> dict[str, Tensor]:
    """The tensors moved down the loss of the fitted rows, at the first rate that lowers it on rows held out, if any."""
    held = torch.nonzero(~fold.texts.fit).flatten()

    def held_out(params: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return sum(float(loss(params, rows, fitted=False)) * len(rows) for rows in held.split(fold.batch))

    before = held_out(start)
    for _ in range(TRIES):
        params = {role: w.clone().requires_grad_(not role.startswith("norm")) for role, w in start.items()}
        moving = [p for p in params.values() if p.requires_grad]
        _descend(fold, moving, partial(loss, params), steps, rate)
        params = {role: p.detach() for role, p in params.items()}
        if not len(held) or held_out(params) < before:
            return params
        rate /= BACK_OFF
    return start


def _alike(owner: Tensor, rows: Tensor) -> Tensor:
    """The rows, those of experts that have fewer of them several times: each expert is drawn about as often."""
    counts = torch.bincount(owner[rows])
    times = (counts.max() / counts.clamp_min(1)).round().long().clamp_max(REPEATED)
    return rows.repeat_interleave(times[owner[rows]])


def _descend(
    fold: "LayerFold", params: Iterable[Tensor], loss: Callable[[Tensor], Tensor], steps: int, peak: float
) -> None:
    """Adam over random rows of the fitted texts: linear warm-up over a tenth, linear decay to zero."""
    fitted = _alike(fold.texts.owner, torch.nonzero(fold.texts.fit).flatten())
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
