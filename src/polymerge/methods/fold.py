"""Fold: several experts of any architecture into one plain decoder, in closed form, layer by layer, closed loop.

Every expert k gets its own slice of the target's residual stream (P_k encodes into it). The target folded so far runs
on the calibration texts, and each linear map is a weighted ridge regression from the target's *own* activations, so
that every error is seen and corrected by the next map:

- q, k, v, up: onto the expert's own values where it owns the position;
- gate: onto the expert's own values where owned, onto −M elsewhere: the SwiGLU gate is the router;
- o, down: from the actual hidden activations onto (target residual − actual residual), slice by slice, weight 1 where
  owned and μ towards zero where not; heads and neurons over the budget are dropped first, by their cost in KL;
- head: onto the owner's centred logits.

Then a block may be refined alone, by gradient, towards the same targets, before the next is solved; the last one and
the head by KL to the owner. One layer of each model is in memory at a time. The relatives: RegMean++ (Nguyen et al.
2025) regresses layer by layer on the merged model's own activations, for equal architectures; FS-Merge (2025)
reconstructs features across models with learned low-rank maps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from polymerge.align.width import Basis, allot, residual_basis
from polymerge.calibrate.calibration import Calibration
from polymerge.clock import Clock
from polymerge.methods._layers import Emit, Knobs, LayerFold
from polymerge.methods._refine import Refine, balanced
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec
from polymerge.recipe import Fold

BASIS_ROWS = 64
TRIAL_ROWS, TRIAL_HELD_OUT, TRIAL_HEAD_STEPS = 16, 12, 20
BETTER = 0.99
"""A trial's gain below a hundredth is within the noise of so few rows."""
GRIDS: dict[str, tuple[float, ...]] = {
    "even": (0.5, 1.0),
    "off_gate": (2.0,),
    "mute": (0.1,),
    "mute_last": (1.0,),
    "off_weight": (0.3,),
    "ridge": (1e-3,),
}
"""Values tried for each knob beside its start, in this order; the start is `Knobs()`."""


@dataclass(frozen=True)
class Choice:
    """What was chosen on held-out text: the shape, the knobs, each expert's `balance`; and the trials behind it.

    `balance` weighs the experts where they compete: for dimensions of the stream, heads, neurons and refinement.
    """

    target: Spec
    knobs: Knobs
    balance: tuple[float, ...]
    trials: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Folded:
    """What a fold did. `excess`: held-out bits per byte over each owner."""

    choice: Choice
    excess: list[float]


def fold(
    experts: Sequence[Source],
    family: Family,
    shapes: Sequence[Spec],
    texts: Calibration,
    settings: Fold,
    *,
    emit: Callable[[Spec], Emit],
    seed: int = 0,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Folded:
    """Fold the experts into the best of the candidate shapes.

    `emit(target)` is called once the shape is known and returns the sink of its weights: (layer or None, role
    -> tensor).
    """
    clock = clock or Clock()
    with clock("basis"):
        bases = bases_of(experts, texts, seed)
    with clock("choose"):
        choice = choose(experts, family, shapes, texts, bases, settings, seed, progress)
    run = LayerFold(
        experts,
        choice.target,
        texts,
        bases,
        choice.knobs,
        Refine(steps=settings.refine, lr=settings.refine_lr, head_steps=settings.refine),
        bias=family.bias,
        balance=choice.balance,
        seed=seed,
        progress=progress,
        clock=clock,
    )
    return Folded(choice, run.run(emit(choice.target)))


def bases_of(experts: Sequence[Source], texts: Calibration, seed: int) -> list[Basis]:
    """The residual basis of every expert, from its own texts."""
    return [
        residual_basis(e, *texts.own(k, BASIS_ROWS), torch.Generator().manual_seed(seed + k))
        for k, e in enumerate(experts)
    ]


def choose(
    experts: Sequence[Source],
    family: Family,
    shapes: Sequence[Spec],
    texts: Calibration,
    bases: Sequence[Basis],
    settings: Fold,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Choice:
    """Shape, then knobs one at a time, by the worst skill of closed-form folds of a few rows; then balance.

    Deterministic coordinate descent: a change stays if the held-out worst skill gains by more than the noise.
    """
    few = texts.subset(TRIAL_ROWS, TRIAL_HELD_OUT)
    quick = Refine(steps=0, head_steps=TRIAL_HEAD_STEPS)
    trials: list[dict[str, Any]] = []

    def tried(spec: Spec, knobs: Knobs, balance: tuple[float, ...]) -> list[float]:
        progress(f"trial {len(trials) + 1}: width {spec.width}, {knobs}")
        run = LayerFold(experts, spec, few, bases, knobs, quick, bias=family.bias, balance=balance, seed=seed)
        excess = [x if math.isfinite(x) else math.inf for x in run.run(_nowhere)]
        shape = {"width": spec.width, "heads": spec.heads, "mlp": spec.mlp}
        trials.append({**shape, **asdict(knobs), "balance": balance, "excess": excess, "worst": max(excess)})
        return excess

    given = {name: getattr(settings, name) for name in GRIDS if getattr(settings, name) is not None}
    knobs, balance = replace(Knobs(), **given), (1.0,) * len(experts)
    free = [name for name in GRIDS if name not in given]
    if len(experts) == 1 or (len(shapes) == 1 and not free):
        return Choice(shapes[-1], knobs, balance)
    target, best = _walk(shapes, lambda spec: tried(spec, knobs, balance))

    def dealt(knobs: Knobs) -> list[int]:
        return allot(bases, target.width, even=knobs.even)

    for name in free:
        for value in GRIDS[name]:
            other = replace(knobs, **{name: value})
            if name == "even" and dealt(other) == dealt(knobs):
                continue
            excess = tried(target, other, balance)
            if max(excess) < BETTER * max(best):
                best, knobs = excess, other
    return Choice(target, knobs, balanced(best), trials)


def _walk(shapes: Sequence[Spec], tried: Callable[[Spec], list[float]]) -> tuple[Spec, list[float]]:
    """The shape of the least worst skill and its excess: one valley over width, walked down from the middle."""
    at = len(shapes) // 2
    best = tried(shapes[at])
    for step in (1, -1):
        start = at
        while 0 <= at + step < len(shapes):
            excess = tried(shapes[at + step])
            if max(excess) >= max(best):
                break
            best, at = excess, at + step
        if at != start:
            break
    return shapes[at], best


def _nowhere(layer: int | None, weights: dict[str, Tensor]) -> None:
    """A trial keeps nothing."""
