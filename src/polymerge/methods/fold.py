"""Fold: several experts of any architecture into one plain decoder, in closed form, layer by layer, closed loop.

Every expert k gets its own slice of the target's residual stream (P_k encodes into it). The target folded so
far runs on the
calibration texts, and each linear map is a weighted ridge regression from the target's *own* activations, so
that every
error is seen and corrected by the next map:

- q, k, v, up: onto the expert's own values where it owns the position;
- gate: onto the expert's own values where owned, onto −M elsewhere: the SwiGLU gate is the router;
- o, down: from the actual hidden activations onto (target residual − actual residual), slice by slice, weight 1 where
  owned and μ towards zero where not; heads and neurons over the budget are dropped first, by their cost in KL;
- head: onto the owner's centred logits.

Then a block may be refined alone, by gradient, towards the same targets, before the next is solved. One layer
of each model
is in memory at a time. The relatives: RegMean++ (Nguyen et al. 2025) regresses layer by layer on the merged
model's own
activations, for equal architectures; FS-Merge (2025) reconstructs features across models with learned low-rank maps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from polymerge.align.width import Basis, residual_basis
from polymerge.calibrate.calibration import Calibration
from polymerge.clock import Clock
from polymerge.methods._layers import Emit, Knobs, LayerFold
from polymerge.methods._refine import Refine
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec
from polymerge.recipe import Fold

BASIS_ROWS = 64
TRIAL_ROWS, TRIAL_HELD_OUT, TRIAL_HEAD_STEPS = 16, 12, 20
BETTER = 0.99
GRIDS: dict[str, tuple[float, ...]] = {
    "off_gate": (2.0,),
    "mute": (0.1,),
    "off_weight": (0.3,),
    "ridge": (1e-3,),
}
"""Values tried for each knob beside its start, in this order; the start is `Knobs()`."""


@dataclass
class Folded:
    """What a fold did. `excess`: held-out bits per byte over each owner; `trials`: what was tried on the way."""

    target: Spec
    knobs: Knobs
    excess: list[float]
    trials: list[dict[str, Any]] = field(default_factory=list)


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
        target, knobs, trials = choose(experts, family, shapes, texts, bases, settings, seed, progress)
    refine = Refine(steps=settings.refine, lr=settings.refine_lr, head_steps=settings.refine)
    run = LayerFold(
        experts,
        target,
        texts,
        bases,
        knobs,
        refine,
        bias=family.bias,
        seed=seed,
        progress=progress,
        clock=clock,
    )
    excess = run.run(emit(target))
    return Folded(target, knobs, excess, trials)


def bases_of(experts: Sequence[Source], texts: Calibration, seed: int) -> list[Basis]:
    """The residual basis of every expert, from its own texts."""
    return [
        residual_basis(e, texts.of(k)[:BASIS_ROWS], texts.scored, torch.Generator().manual_seed(seed + k))
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
) -> tuple[Spec, Knobs, list[dict[str, Any]]]:
    """Shape, then knobs one at a time, by the worst skill of closed-form folds of a few rows, on held-out rows."""
    few = texts.subset(TRIAL_ROWS, TRIAL_HELD_OUT)
    quick = Refine(steps=0, head_steps=TRIAL_HEAD_STEPS)
    trials: list[dict[str, Any]] = []

    def worst(spec: Spec, knobs: Knobs) -> float:
        progress(f"trial {len(trials) + 1}: width {spec.width}, {knobs}")
        run = LayerFold(experts, spec, few, bases, knobs, quick, bias=family.bias, seed=seed)
        excess = run.run(_nowhere)
        score = max(excess) if all(math.isfinite(x) for x in excess) else math.inf
        trials.append({
            "width": spec.width, "heads": spec.heads, "mlp": spec.mlp,
            "ridge": knobs.ridge, "mute": knobs.mute, "off_gate": knobs.off_gate, "off_weight": knobs.off_weight,
            "excess": excess, "worst": score,
        })  # fmt: skip
        return score

    given = {name: getattr(settings, name) for name in GRIDS if getattr(settings, name) is not None}
    knobs = replace(Knobs(), **given)
    free = [name for name in GRIDS if name not in given] if len(experts) > 1 else []
    if len(shapes) == 1 and not free:
        return shapes[0], knobs, trials
    # Worst skill against width has one valley: walk down it from the middle.
    at = len(shapes) // 2
    best = worst(shapes[at], knobs)
    for step in (1, -1):
        start = at
        while 0 <= at + step < len(shapes) and (score := worst(shapes[at + step], knobs)) < best:
            best, at = score, at + step
        if at != start:
            break
    target = shapes[at]
    for name in free:
        for value in GRIDS[name]:
            tried = replace(knobs, **{name: value})
            # A hundredth is within the noise of so few rows: the start stays then.
            if (score := worst(target, tried)) < BETTER * best:
                best, knobs = score, tried
    return target, knobs, trials


def _nowhere(layer: int | None, weights: dict[str, Tensor]) -> None:
    """A trial keeps nothing."""
