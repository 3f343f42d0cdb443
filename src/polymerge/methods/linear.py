"""Linear: the weighted average of weights after zero-padding, units in the order in which they are stored.

    W' = Σ_k w_k W_k,   Σ w = 1      (model soups: Wortsman et al. 2022; federated averaging: McMahan et al. 2017)

Where shapes agree this is the plain average of the stored tensors. A smaller expert is padded without changing what it
computes: c x in the first dimensions of the stream, c² = D/d; heads and neurons first; layers spread evenly, the
identity elsewhere. Nothing is aligned: the control that shows what alignment is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polymerge.calibrate.calibration import Calibration
from polymerge.methods._lift import Lifted, hold, lift, shares
from polymerge.methods._maps import Stream, semi_orthogonal
from polymerge.methods._merge import Alignment, Emit, emit_average
from polymerge.model.source import Source
from polymerge.model.spec import Spec


@dataclass(frozen=True)
class Method:
    """Weighted average after zero-padding. `weights`: one per expert in the recipe's order; empty: equal."""

    weights: tuple[float, ...] = ()

    @staticmethod
    def grid(experts: int) -> tuple[dict[str, Any], ...]:
        """What a benchmark tries, as `GRID` of other methods."""
        return ({}, {"weights": (0.3, 0.7)}, {"weights": (0.7, 0.3)}) if experts == 2 else ({},)  # noqa: PLR2004

    def merge(
        self, experts: Sequence[Source], anchor: int, target: Spec, texts: Calibration, emit: Emit, seed: int
    ) -> None:
        """Emit the target's weights. Raises PreflightError where an expert cannot be padded to the target."""
        del anchor, texts, seed
        weights = shares(self.weights, len(experts))
        lifted = lift(experts, target, absorb=False)
        streams = [padded(e, target) for e in lifted]
        emit_average(lifted, Alignment(streams, [{}] * target.layers), weights, target, emit)


def padded(expert: Lifted, target: Spec) -> Stream:
    """The stream of an expert in the first dimensions of the target's; PreflightError where any axis is larger."""
    hold(expert, target)
    eye: Tensor = torch.eye(expert.spec.width, target.width, dtype=torch.float64)
    return semi_orthogonal(eye)
