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
    """`gram` = Σ w xxᵀ (in, in), `cross` = Σ w xyᵀ (in, out), `power` = Σ w y² (out,), `weight` = Σ w."""

    gram: Float[Tensor, "n n"]
    cross: Float[Tensor, "n out"]
    power: Float[Tensor, " out"]
    weight: float = 0.0

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> "Moments":
        """Empty moments."""
        like = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(inputs, inputs, **like), torch.zeros(inputs, outputs, **like), torch.zeros(outputs, **like))

    def add(self, x: Float[Tensor, "row n"], y: Float[Tensor, "row out"], weight: Float[Tensor, " row"]) -> None:
        """Count rows in; rows of weight zero cost nothing."""
        seen = weight > 0
        if not bool(seen.all()):
            x, y, weight = x[seen], y[seen], weight[seen]
        root = weight.sqrt()[:, None].to(x.dtype)
        x, y = x * root, y.to(x.dtype) * root
        self.gram += (x.T @ x).double()
        self.cross += (x.T @ y).double()
        self.power += y.double().pow(2).sum(0)
        self.weight += float(weight.sum())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.gram + other.gram, self.cross + other.cross, self.power + other.power, self.weight + other.weight
        )

    def damped(self, ridge: float, inputs: Tensor | None = None) -> Float[Tensor, "m m"]:
        """The Gram matrix of the chosen inputs plus λ times its mean diagonal."""
        gram = self.gram if inputs is None else self.gram[inputs][:, inputs]
        scale = self.gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        return gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)

    def solve(self, ridge: float, inputs: Tensor | None = None) -> Float[Tensor, "m out"]:
        """argmin_A Σ w ‖y − x A‖² + λ · mean diagonal · ‖A‖², over the chosen inputs (all by default)."""
        cross = self.cross if inputs is None else self.cross[inputs]
        return torch.cholesky_solve(cross, torch.linalg.cholesky(self.damped(ridge, inputs)))

    def error(self, solution: Float[Tensor, "n out"]) -> Float[Tensor, " out"]:
        """Mean squared residual of each output under a solution, from the moments alone."""
        left = self.power - 2 * (solution * self.cross).sum(0) + (solution * (self.gram @ solution)).sum(0)
        return left.clamp_min(0) / max(self.weight, 1e-300)
