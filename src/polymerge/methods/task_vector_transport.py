"""Theseus: what fine-tuning changed in a donor, carried over to an anchor of another width and added.

    W' = W_A + α Σ_B T_outᵀ (W_B − W_B⁰) T_in,      T = argmin ‖X_B T − X_A‖ over (semi-)orthogonal T

(Rinaldi et al. 2026, arXiv 2602.12952, without whitening.) W_B⁰ is the base that the donor was tuned from; X_B and X_A
are the inputs (T_in) or outputs (T_out) of one linear map in both *bases*, on the same tokens, not centred. Norms'
weights and biases go by T_out alone. The released code, for image encoders, leaves embeddings as they are; with one
vocabulary they are maps like any other, whose inputs agree, and so is the head.

`bases`: the base of each expert, in the recipe's order. Recovers what was tuned in a base that is the anchor's own in
other coordinates, but only as far as the base's activations reach: a map to more units than it reads, such as gate and
up, leaves directions of its output unseen. Layers go one to one, so both bases need as many.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from polymerge.align.procrustes import orthogonal
from polymerge.calibrate.calibration import Calibration
from polymerge.errors import PreflightError
from polymerge.methods._lift import Changed, Lifted, as_rows, hold, rows_of_all
from polymerge.methods._maps import Weights
from polymerge.methods._merge import Alignment, Emit, emit_average
from polymerge.methods._traces import INPUTS, activations
from polymerge.methods.linear import padded
from polymerge.model.source import Source
from polymerge.model.spec import Spec

SIDES = {role: (feed, role) for role, feed in INPUTS.items()} | {"norm1": ("", "norm1"), "norm2": ("", "norm2")}
"""What is carried over in a layer: the input and the output by which it is aligned."""
OUTER = {"embed": ("", "embed"), "norm": ("", "norm"), "head": ("norm", "")}
"""The same outside the layers; nothing to align: tokens."""


@dataclass(frozen=True)
class Method:
    """Task vectors transported by Procrustes, then added. `alpha`: how much; `rows` of text for the activations."""

    GRID: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"alpha": 0.5}, {"alpha": 0.25})

    bases: tuple[str, ...] = ()
    alpha: float = 1.0
    rows: int = 64
    batch: int = 16

    def merge(
        self, experts: Sequence[Source], anchor: int, target: Spec, texts: Calibration, emit: Emit, seed: int
    ) -> None:
        """Emit the target's weights. Raises PreflightError as `check` does."""
        del seed
        lifted, own, bases = self.check(experts, anchor, target)
        tokens = rows_of_all(texts, self.rows)
        batches = tokens.split(as_rows(self.batch, tokens))
        gifts = [_carried(own, bases[k], expert, batches) for k, expert in enumerate(experts) if k != anchor]

        def add(index: int | None, own: Weights) -> Weights:
            for gift in gifts:
                own |= {name: own[name] + self.alpha * change for name, change in gift[index].items()}
            return own

        added = Changed(lifted, add)
        emit_average([added], Alignment([padded(added, target)], [{}] * target.layers), [1.0], target, emit)

    def check(self, experts: Sequence[Source], anchor: int, target: Spec) -> tuple[Lifted, Lifted, list[Source]]:
        """The anchor and its base in the target's layout, and all bases.

        Raises PreflightError without bases, or where one does not fit its expert.
        """
        if len(self.bases) != len(experts):
            raise PreflightError(
                f"options.bases: {len(self.bases)} for {len(experts)} experts; name the model that each was tuned from"
            )
        bases = [Source(Path(b), device=e.device, dtype=e.dtype) for b, e in zip(self.bases, experts, strict=True)]
        for base, expert in zip(bases, experts, strict=True):
            if replace(base.spec, max_positions=0) != replace(expert.spec, max_positions=0):
                raise PreflightError(f"{base.path}: not the base of {expert.path}: their architectures differ")
        lifted, own = (Lifted(x[anchor], target, absorb=False) for x in (experts, bases))
        hold(lifted, target)
        return lifted, own, bases


@torch.no_grad()
def _carried(anchor: Lifted, base: Source, tuned: Source, batches: Sequence[Tensor]) -> dict[int | None, Weights]:
    """A donor's differences in the anchor's coordinates, by layer; None: outside the layers."""
    if base.spec.layers != anchor.spec.layers or base.spec.vocab != anchor.spec.vocab:
        raise PreflightError(
            f"{base.path}: {base.spec.layers} layers and {base.spec.vocab} tokens, the anchor has {anchor.spec.layers}"
            f" and {anchor.spec.vocab}: differences are carried over layer by layer, on the same tokens"
        )
    crosses: list[dict[str, Tensor]] = [{} for _ in range(anchor.spec.layers + 2)]
    for tokens in batches:
        both = [activations(e.spec, e.outer(), e.layer, tokens.to(base.device)) for e in (base, anchor)]
        for cross, theirs, ours in zip(crosses, *both, strict=True):
            for kind in theirs.keys() & ours.keys():
                moment = theirs[kind].flatten(0, 1).T.double() @ ours[kind].flatten(0, 1).double()
                cross[kind] = cross[kind] + moment if kind in cross else moment
    turns = [{kind: orthogonal(cross) for kind, cross in some.items()} for some in crosses]
    outer = _moved(base.outer(), tuned.outer(), turns[0] | turns[-1], OUTER, anchor.outer())
    return {None: outer} | {
        i: _moved(base.layer(i), tuned.layer(i), turns[i + 1], SIDES, anchor.layer(i)) for i in range(base.spec.layers)
    }


def _moved(
    before: Weights, after: Weights, turns: Weights, sides: dict[str, tuple[str, str]], like: Weights
) -> Weights:
    """T_outᵀ ΔW T_in of every map, Δb T_out of every vector that the anchor has too."""
    out = {}
    for name in (name for name in after if name in like and name.split(".")[0] in sides):
        feed, role = sides[name.split(".")[0]]
        change = after[name].double() - before[name].double()
        if change.ndim == 1:
            change = change @ turns[role]
        else:  # an embedding is (token, unit): its units are an output
            left, right = (None, role) if role == "embed" else (role, feed)
            change = turns[left].T @ change if left else change
            change = change @ turns[right] if right else change
        out[name] = change.to(like[name])
    return out
