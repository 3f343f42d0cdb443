"""Orthogonal matching pursuit for many signals over one dictionary (Pati, Rezaiifar & Krishnaprasad 1993).

For a signal x (dim,) and atoms d_j (rows of the dictionary), repeat k times:

    j*    = argmax_j |<r, d_j>| / ‖d_j‖             the atom most parallel to the residual r
    w     = argmin_w ‖x − Σ_{j chosen} w_j d_j‖      least squares over all chosen atoms
    r     = x − Σ w_j d_j

All signals of a chunk advance together. The Gram matrix of a signal's chosen atoms grows by one row an
iteration, and so does its Cholesky factor L: with b = <chosen, d_j*>, v = L⁻¹ b, the new row is
[v, sqrt(‖d_j*‖² − ‖v‖²)]. With many signals <r, d> is updated from the Gram matrix G of the dictionary,
<x, d> − Σ w_j G_j, and no longer depends on the dimension (Rubinstein, Zibulevsky & Elad 2008). Atoms are
normalised first. Correlations run in the dictionary's precision, solves in float64.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_INDEPENDENT = 1e-10  # squared sine of the angle between a new atom and the span of those chosen


def pursue(
    signals: Float[Tensor, "signal dim"],
    dictionary: Float[Tensor, "atom dim"],
    atoms: int,
    *,
    tolerance: float = 1e-6,
    chunk: int = 512,
) -> tuple[Int64[Tensor, "signal k"], Float[Tensor, "signal k"]]:
    """Chosen atoms and their float64 weights, k = min(atoms, atoms in the dictionary, dim).

    A signal stops early (weights 0 from there on) when its residual is below `tolerance` of its norm, or when
    no atom outside the span of those chosen is left. Flops: about 2 · D · dim · (D + signals) + 2 · signals ·
    D · k² for D atoms in the dictionary; memory: D² + chunk · (2 D + k dim) numbers.
    Raises ValueError unless `atoms` is positive and the dictionary has atoms.
    """
    if atoms < 1 or not len(dictionary):
        raise ValueError(f"{atoms} atoms from a dictionary of {len(dictionary)}; expected at least 1 of each")
    norms = dictionary.double().norm(dim=1)
    usable = norms > 0
    unit = dictionary / norms.clamp_min(torch.finfo(torch.float64).tiny)[:, None].to(dictionary)
    unit[~usable] = 0
    count = min(atoms, *dictionary.shape)
    # The Gram matrix pays where signals × iterations outnumber the dictionary's atoms.
    gram = unit @ unit.T if len(signals) * (count - 1) > len(unit) else None
    index = torch.zeros(len(signals), count, dtype=torch.int64)
    weight = torch.zeros(len(signals), count, dtype=torch.float64)
    for start in range(0, len(signals), chunk):
        rows = slice(start, start + chunk)
        index[rows], weight[rows] = _pursue(signals[rows].double(), unit, gram, count, tolerance)
    return index, weight / norms[index].clamp_min(torch.finfo(torch.float64).tiny)


def _pursue(
    x: Float[Tensor, "signal dim"],
    unit: Float[Tensor, "atom dim"],
    gram: Float[Tensor, "atom atom"] | None,
    count: int,
    tolerance: float,
) -> tuple[Int64[Tensor, "signal k"], Float[Tensor, "signal k"]]:
    n, dim = x.shape
    every = torch.arange(n)
    index = torch.zeros(n, count, dtype=torch.int64)
    weight = torch.zeros(n, count, dtype=torch.float64)
    chosen = x.new_zeros(n, count, dim)
    factor = torch.eye(count, dtype=torch.float64).repeat(n, 1, 1)
    projection = torch.zeros(n, count, 1, dtype=torch.float64)  # <chosen atom, x>
    limit = tolerance * x.norm(dim=1)
    residual = x
    start = x.to(unit) @ unit.T
    active = residual.norm(dim=1) > limit
    for k in range(count):
        if gram is None and k:
            scores = residual.to(unit) @ unit.T
        else:
            scores = start.clone()
            for j in range(k):
                assert gram is not None
                scores.addcmul_(gram[index[:, j]], weight[:, j, None].to(unit), value=-1)
        best = scores.abs_().argmax(1)
        atom = unit[best].double()
        new = torch.linalg.solve_triangular(factor[:, :k, :k], chosen[:, :k] @ atom[:, :, None], upper=False).squeeze(2)
        left = atom.square().sum(1) - new.square().sum(1)
        active = active & (left > _INDEPENDENT)
        if not active.any():
            break
        # A signal that has stopped keeps a unit row without projection, so its solution stays as it is.
        keep = active.double()
        index[:, k] = torch.where(active, best, index[:, k])
        chosen[:, k] = atom * keep[:, None]
        factor[:, k, :k] = new * keep[:, None]
        factor[:, k, k] = torch.where(active, left, torch.ones_like(left)).sqrt()
        projection[every, k, 0] = (atom * x).sum(1) * keep
        lower = factor[:, : k + 1, : k + 1]
        half = torch.linalg.solve_triangular(lower, projection[:, : k + 1], upper=False)
        weight[:, : k + 1] = torch.linalg.solve_triangular(lower.mT, half, upper=True).squeeze(2)
        residual = x - torch.einsum("nk,nkd->nd", weight[:, : k + 1], chosen[:, : k + 1])
        active = active & (residual.norm(dim=1) > limit)
    return index, weight
