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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from polymerge.align import depth
from polymerge.align.width import Basis, allot, residual_basis
from polymerge.calibrate.calibration import Calibration
from polymerge.clock import Clock
from polymerge.features import Features
from polymerge.methods._layers import Emit, Knobs, LayerFold
from polymerge.methods._refine import Refine, balanced
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec
from polymerge.recipe import Fold

BALANCE_MOST = 4.0
"""What one expert gains by more is less than what the others lose."""
BETTER = 0.99
"""A trial's gain below a hundredth is within the noise of so few rows."""
PASSES = 16.0
"""Over the calibration texts at most, in refining a block: more gain nothing, or learn little text by heart."""
GRIDS: dict[str, tuple[Any, ...]] = {
    "hosts": ("centred",),
    "even": (0.5, 1.0),
    "off_gate": (2.0,),
    "mute": (0.1,),
    "mute_last": (1.0,),
    "off_weight": (0.3,),
    "ridge": (1e-3,),
}
"""Values tried for each knob beside its start, in this order; the start is `Knobs()`."""
DEALT = ("hosts", "even")
"""Knobs that may deal out the same at both values."""


@dataclass(frozen=True)
class Trials:
    """Rows of each expert, fitted and held out, by which shapes and knobs are tried.

    In closed form first, then as many refined ones as shapes gain, a block by `steps` at most. More than two experts
    need `many` times the rows there: else the one that lacks rows most speaks for all, and for shapes with little to
    fit.
    """

    rows: int = 16
    held_out: int = 12
    refined_rows: int = 64
    refined_held_out: int = 32
    steps: int = 20
    head_steps: int = 20
    many: float = 2.5

    def refined(self, experts: int) -> int:
        """Rows of each of so many experts that a refined trial fits."""
        return round(self.refined_rows * (self.many if experts > 2 else 1))  # noqa: PLR2004


@dataclass(frozen=True)
class Settings:
    """How a fold is solved: knobs that are `given`, the others are chosen; `batch` rows on the device at once.

    `trials` None: nothing is tried, the middle one of the candidate shapes and the knobs' starts are taken.
    """

    given: Mapping[str, Any] = field(default_factory=dict, hash=False)
    refine: Refine = field(default_factory=Refine)
    trials: Trials | None = field(default_factory=Trials)
    basis_rows: int = 64
    batch: int = 32

    @classmethod
    def of(cls, asked: Fold) -> "Settings":
        """What a recipe asks for."""
        given = {name: getattr(asked, name) for name in GRIDS if getattr(asked, name) is not None}
        refine = Refine(steps=asked.refine, lr=asked.refine_lr, head_steps=asked.refine, passes=PASSES)
        return cls(given, refine, Trials() if asked.trials else None)


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
    """What a fold did.

    `excess`: what each expert's held-out rows lost, as `_judge.lag` measures it. `features`: where each expert's states
    stand, for healing.
    """

    choice: Choice
    excess: list[float]
    features: list[Features | None] = field(default_factory=list)


def fold(
    experts: Sequence[Source],
    family: Family,
    shapes: Sequence[Spec],
    texts: Calibration,
    settings: Settings,
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
        bases = bases_of(experts, texts, settings, seed)
    with clock("choose"):
        choice = choose(experts, family, shapes, texts, bases, settings, seed, progress)
    run = LayerFold(
        experts,
        choice.target,
        texts,
        bases,
        choice.knobs,
        settings.refine,
        bias=family.bias,
        balance=choice.balance,
        seed=seed,
        batch=settings.batch,
        progress=progress,
        clock=clock,
    )
    return Folded(choice, run.run(emit(choice.target)), run.features())


def bases_of(experts: Sequence[Source], texts: Calibration, settings: Settings, seed: int = 0) -> list[Basis]:
    """The residual basis of every expert, from its own texts."""
    half = max(1, settings.batch // 2)  # of the gradients
    return [
        residual_basis(e, *texts.own(k, settings.basis_rows), torch.Generator().manual_seed(seed + k), half)
        for k, e in enumerate(experts)
    ]


def choose(
    experts: Sequence[Source],
    family: Family,
    shapes: Sequence[Spec],
    texts: Calibration,
    bases: Sequence[Basis],
    settings: Settings,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Choice:
    """Shape and knobs by the worst skill of closed-form folds of a few rows; both again, and balance, by refined ones.

    Few rows in closed form miss the best width by one or two, on either side: so the next ones are tried with more
    rows and refined, while they gain; and the knobs' starts once, for what helps a closed form may hurt a refined fold.
    How the experts lag behind each other shows only then, too: what few rows cost in closed form is another thing, and
    the expert that pays more of it may be the other one.
    """
    trials: list[dict[str, Any]] = []
    even, plan = (1.0,) * len(experts), settings.trials

    def tried(spec: Spec, knobs: Knobs, rows: Calibration, refine: Refine) -> list[float]:
        progress(f"trial {len(trials) + 1}: width {spec.width}, {knobs}")
        run = LayerFold(
            experts, spec, rows, bases, knobs, refine, bias=family.bias, balance=even, seed=seed, batch=settings.batch
        )
        excess = [x if math.isfinite(x) else math.inf for x in run.run(_nowhere)]
        shape = {"width": spec.width, "heads": spec.heads, "mlp": spec.mlp}
        trials.append({**shape, **asdict(knobs), "rows": len(rows.tokens), "excess": excess, "worst": max(excess)})
        return excess

    start = knobs = replace(Knobs(), **settings.given)
    free = {name: grid for name, grid in GRIDS.items() if name not in settings.given}
    if len(experts) == 1 or (len(shapes) == 1 and not free):
        return Choice(shapes[-1], knobs, even)
    if plan is None:
        return Choice(shapes[len(shapes) // 2], knobs, even)

    def dealt(spec: Spec, knobs: Knobs) -> tuple[list[int], list[tuple[int, ...]]]:
        shares = allot(bases, spec.width, even=knobs.even)
        return shares, [depth.spread(e.spec.layers, spec.layers, knobs.hosts) for e in experts]

    few = texts.subset(plan.rows, plan.held_out)
    closed = replace(settings.refine, steps=0, head_steps=plan.head_steps, passes=math.inf)
    target, knobs, _ = search(shapes, knobs, free, lambda spec, other: tried(spec, other, few, closed), dealt)
    more = texts.subset(plan.refined(len(experts)), plan.refined_held_out)
    refined = replace(closed, steps=min(plan.steps, settings.refine.steps))
    at, lag = walk(shapes, shapes.index(target), lambda spec: tried(spec, knobs, more, refined), BETTER)
    if knobs != start and max(found := tried(shapes[at], start, more, refined)) < max(lag):
        knobs, lag = start, found
    return Choice(shapes[at], knobs, balanced(lag, BALANCE_MOST), trials)


def walk(
    shapes: Sequence[Spec], at: int, tried: Callable[[Spec], list[float]], better: float = 1.0
) -> tuple[int, list[float]]:
    """From shape `at` to the bottom of the one valley that the worst loss makes over width, and the losses there.

    Wider first; narrower where the first wider shape is not `better` times as bad. `tried`: a loss for each expert.
    """
    best, start = tried(shapes[at]), at
    for step in (1, -1):
        while 0 <= at + step < len(shapes) and gained(max(found := tried(shapes[at + step])), max(best), better):
            best, at = found, at + step
        if at != start:
            break
    return at, best


def gained(found: float, best: float, better: float) -> bool:
    """Whether a loss is less than `better` times the best; below zero, where a fold is ahead of its owner, as far."""
    return found < (best * better if best > 0 else best / better)


def search(
    shapes: Sequence[Spec],
    knobs: Knobs,
    grids: Mapping[str, Sequence[Any]],
    tried: Callable[[Spec, Knobs], list[float]],
    dealt: Callable[[Spec, Knobs], Any],
) -> tuple[Spec, Knobs, list[float]]:
    """The shape and knobs of the least worst loss, and the losses, one for each expert, that `tried` gives them.

    One valley over width, walked down from the middle; then each knob's other values, one knob at a time. A knob's
    change stays if the worst gains by more than the noise. `dealt`: a shape's width and layers as knobs deal them out.
    """
    at, best = walk(shapes, len(shapes) // 2, lambda spec: tried(spec, knobs))
    target = shapes[at]
    for name, values in grids.items():
        for value in values:
            other = replace(knobs, **{name: value})
            if name in DEALT and dealt(target, other) == dealt(target, knobs):
                continue
            if gained(max(found := tried(target, other)), max(best), BETTER):
                best, knobs = found, other
    return target, knobs, best


def _nowhere(layer: int | None, weights: dict[str, Tensor]) -> None:
    """A trial keeps nothing."""
