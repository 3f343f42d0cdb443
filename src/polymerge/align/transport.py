"""Optimal transport between the units of two models, uniform marginals, log domain.

    P = argmin_P Σ P_ij C_ij − ε H(P),   P 1 = 1/n,   Pᵀ 1 = 1/m          (Sinkhorn: Cuturi 2013)

C (n, m) is 1 − correlation of activations. ε = 0: the exact plan, a linear assignment of units repeated up to the
least common multiple of n and m (uniform marginals have an integral optimum).

A plan becomes two maps (n, m), one for each side of a weight matrix:

    mean   m P, columns sum to 1: a target unit computes the weighted mean of source units (rows of a weight)
    share  n P, rows sum to 1: a source unit's outgoing weight is shared out among targets, none lost (columns)

At n = m both are n P. Used on both sides, n P is wrong by n/m at unequal widths.

What correlation-cost transport recovers: permutations, and copies or means of units at unequal widths. What it
cannot: signed permutations (a flipped unit looks furthest) and rotations.
"""

import math

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

LARGEST = 8192
"""Units after repetition up to which the exact plan is computed (the assignment is cubic)."""


def sinkhorn(
    cost: Float[Tensor, "*batch n m"], epsilon: float, *, sweeps: int = 2000, tolerance: float = 1e-9
) -> Float[Tensor, "*batch n m"]:
    """The entropic plan in float64; sums to 1. Raises ValueError unless ε > 0."""
    if epsilon <= 0:
        raise ValueError(f"sinkhorn needs a regularisation above 0, not {epsilon}; use exact()")
    kernel = -cost.double() / epsilon
    n, m = kernel.shape[-2:]
    f, g = torch.zeros_like(kernel[..., :1]), torch.zeros_like(kernel[..., :1, :])
    for _ in range(sweeps):
        before = f
        g = -math.log(m) - (kernel + f).logsumexp(-2, keepdim=True)
        f = -math.log(n) - (kernel + g).logsumexp(-1, keepdim=True)
        if float((f - before).abs().max()) < tolerance:
            break
    return (kernel + f + g).exp()


def exact(cost: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The optimal plan, float64, sums to 1. Raises ValueError where lcm(n, m) exceeds `LARGEST`."""
    n, m = cost.shape
    units = math.lcm(n, m)
    if units > LARGEST:
        raise ValueError(f"the exact plan of {n} and {m} units needs an assignment of {units}; take epsilon > 0")
    repeated = cost.double().cpu().repeat_interleave(units // n, 0).repeat_interleave(units // m, 1)
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(repeated.numpy()))
    plan = torch.zeros(n * m, dtype=torch.float64)
    at = rows // (units // n) * m + columns // (units // m)
    plan.index_add_(0, at, torch.full((units,), 1 / units, dtype=torch.float64))
    return plan.view(n, m).to(cost.device)


def plan(cost: Float[Tensor, "*batch n m"], epsilon: float) -> Float[Tensor, "*batch n m"]:
    """`exact` where ε = 0, else `sinkhorn`."""
    if epsilon != 0:
        return sinkhorn(cost, epsilon)
    flat = cost.reshape(-1, *cost.shape[-2:])
    return torch.stack([exact(c) for c in flat]).view(cost.shape)


def mean_map(coupling: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n m"]:
    """M P: every target unit is a weighted mean of source units."""
    return coupling * coupling.shape[-1]


def share_map(coupling: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n m"]:
    """N P: every source unit's outgoing weight is shared out whole."""
    return coupling * coupling.shape[-2]
