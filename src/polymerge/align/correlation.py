"""Correlations between the units of two models on the same tokens, from additive moments (float64).

corr_ij = (E[x_i y_j] − E[x_i] E[y_j]) / (σ_i σ_j);   0 where a unit never moves
"""

import torch
from jaxtyping import Float
from torch import Tensor


class Correlation:
    """Sums over rows of x (row, n) and y (row, m)."""

    def __init__(self, n: int, m: int, device: torch.device | str = "cpu") -> None:
        zeros = torch.zeros(n + m, dtype=torch.float64, device=device)
        self.rows = 0
        self.cross = torch.zeros(n, m, dtype=torch.float64, device=device)
        self.sums, self.squares = zeros, zeros.clone()

    def add(self, x: Float[Tensor, "*rows n"], y: Float[Tensor, "*rows m"]) -> None:
        """Count rows in."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        both = torch.cat([x, y], dim=1)
        self.rows += len(x)
        self.cross += (x.T @ y).double()
        self.sums += both.double().sum(0)
        self.squares += both.double().pow(2).sum(0)

    def matrix(self) -> Float[Tensor, "n m"]:
        """Pearson correlations."""
        n = len(self.cross)
        mean, power = self.sums / self.rows, self.squares / self.rows
        spread = power - mean.pow(2)
        moves = spread > 1e-12 * power
        inverse = torch.where(moves, spread.clamp_min(1e-300).rsqrt(), torch.zeros_like(spread))
        centred = self.cross / self.rows - mean[:n, None] * mean[None, n:]
        return (inverse[:n, None] * centred * inverse[None, n:]).clamp(-1, 1)

    def rms(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
        """Root mean square of every unit."""
        size = (self.squares / self.rows).sqrt()
        return size[: len(self.cross)], size[len(self.cross) :]
