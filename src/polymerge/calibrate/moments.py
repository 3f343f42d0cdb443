"""Weighted second moments XᵀWX and XᵀWY, and the ridge regression that needs nothing else.

Moments are additive over batches, files and machines: a sum of moments is the moments of the joined data. They
accumulate in float64 whatever the dtype of the activations. λ is relative to the mean of the Gram diagonal, so that
it means the same for streams of any scale (Hoerl & Kennard 1970).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Moments:
    """`gram` = Σ w xxᵀ (in, in), `cross` = Σ w xyᵀ (in, out), `weight` = Σ w of the rows in `cross`."""

    gram: Float[Tensor, "n n"]
    cross: Float[Tensor, "n out"]
    weight: float = 0.0

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> "Moments":
        """Empty moments."""
        gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        return cls(gram, gram.new_zeros(inputs, outputs))

    def add(self, x: Float[Tensor, "row n"], y: Float[Tensor, "row out"], weight: Float[Tensor, " row"]) -> None:
        """Count rows in."""
        self.add_gram(x, weight)
        self.add_cross(x, y, weight)

    def add_gram(self, x: Float[Tensor, "row n"], weight: Float[Tensor, " row"]) -> None:
        """Count rows into the Gram matrix only; a negative weight takes back what was counted."""
        x, weight = _kept(weight, x, weight)
        self.gram += ((x * weight[:, None].to(x.dtype)).T @ x).double()

    def add_cross(self, x: Float[Tensor, "row n"], y: Float[Tensor, "row out"], weight: Float[Tensor, " row"]) -> None:
        """Count rows into the cross moments only."""
        x, y, weight = _kept(weight, x, y, weight)
        self.cross += (x.T @ (y.to(x.dtype) * weight[:, None].to(x.dtype))).double()
        self.weight += float(weight.sum())

    def damped(self, ridge: float, inputs: Tensor | None = None) -> Float[Tensor, "m m"]:
        """The Gram matrix of the chosen inputs plus λ times its mean diagonal; positive definite.

        Batches are summed in their own dtype and some are taken back, so rounding can leave an eigenvalue below −λ: it
        is then lifted by as much again.
        """
        gram = self.gram if inputs is None else self.gram[inputs][:, inputs]
        scale = self.gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        damped = gram + ridge * scale * one
        if int(torch.linalg.cholesky_ex(damped).info):
            damped = damped - 2 * torch.linalg.eigvalsh(damped)[0].clamp_max(0) * one
        return damped

    def solve(self, ridge: float, inputs: Tensor | None = None) -> Float[Tensor, "m out"]:
        """argmin_A Σ w ‖y − x A‖² + λ · mean diagonal · ‖A‖², over the chosen inputs (all by default)."""
        cross = self.cross if inputs is None else self.cross[inputs]
        return torch.cholesky_solve(cross, torch.linalg.cholesky(self.damped(ridge, inputs)))


def _kept(weight: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of a weight that is not zero."""
    seen = weight != 0
    return tensors if bool(seen.all()) else tuple(t[seen] for t in tensors)
