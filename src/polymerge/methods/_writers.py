"""What writes into the fold's stream, o and down: a regression for each expert's slice, from the inputs that are kept.

Inputs are heads' values or neurons; those over the budget go first, by their cost in KL (`align/prune.py`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polymerge.align import prune
from polymerge.calibrate.moments import Moments

if TYPE_CHECKING:
    from polymerge.methods._layers import LayerFold


def moments(fold: "LayerFold", features: Callable[[Tensor], Tensor], inputs: int) -> list[Moments]:
    """Per expert: moments from hidden features onto what its slice still lacks.

    Nearly all positions of a row have one weight for an expert: 1 in its own rows, μ in others'. So one Gram matrix for
    each owner serves all slices, and only positions that differ (shared beginnings) are counted apart. Each position
    counts as `LayerFold.heed` says.
    """
    texts = fold.texts
    out = [Moments.zeros(inputs, s.stop - s.start, fold.device) for s in fold.slices]
    shared = torch.zeros(len(fold.slices), inputs, inputs, dtype=torch.float64, device=fold.device)
    for rows in fold.batches():
        heard = (features(rows), fold.state[rows].to(fold.device), fold.heed[rows, :, None].sqrt().to(fold.device))
        x, state, root = fold.audible(*heard)
        x = x * root
        owner, fit = texts.owner[rows], texts.fit[rows]
        for j in owner[fit].unique().tolist():
            mine = x[fit & (owner == j)].flatten(0, 1)
            shared[j] += (mine.T @ mine).double()
        for k, part in enumerate(fold.slices):
            goal, weight = fold.audible(*fold.goal(k, rows))
            lack = (goal - state[..., part]) * root
            out[k].add_cross(x.flatten(0, 1), lack.flatten(0, 1), weight.flatten())
            usual = torch.where(owner == k, 1.0, fold.mute).to(weight)[:, None] * fit[:, None].to(weight)
            out[k].add_gram(x.flatten(0, 1), (weight - usual).flatten())
    for k, one in enumerate(out):
        for j, gram in enumerate(shared):
            one.gram += gram * (1.0 if j == k else fold.mute)
    return out


def kept(fold: "LayerFold", writers: list[Moments], layer: int, where: str, group: int, most: int) -> Tensor:
    """Which groups of inputs stay: the cheapest to lose in KL go first, whoever they belong to.

    `where` the writer's output stands: "mid" of the layer or "out" of it.
    """
    groups = len(writers[0].gram) // group
    if groups <= most:
        return torch.arange(groups)
    shares = [
        prune.Writer(
            m.damped(fold.knobs.ridge) / max(m.weight, 1e-30),
            m.solve(fold.knobs.ridge) @ _root(fold.balance[k] * _metric(fold, k, layer, where)),
        )
        for k, m in enumerate(writers)
    ]
    return prune.keep_groups(shares, group, most)


def solved(fold: "LayerFold", writers: list[Moments], inputs: Tensor) -> Tensor:
    """The writer's weight (resid, in), each expert's slice by its own regression."""
    out = torch.zeros(fold.target.width, len(inputs), dtype=fold.dtype, device=fold.device)
    for one, part in zip(writers, fold.slices, strict=True):
        out[part] = one.solve(fold.knobs.ridge, inputs.to(fold.device)).T.to(fold.dtype)
    return out


def _metric(fold: "LayerFold", k: int, layer: int, where: str) -> Tensor:
    """Fisher matrix of expert k's slice where its state now stands."""
    hosts, basis = fold.experts.hosts[k], fold.bases[k]
    reached = sum(host <= layer for host in hosts)
    last = max(reached - 1, 0)
    at_mid = reached == 0 or (where == "mid" and hosts[last] == layer)
    fisher = (basis.fisher_mid if at_mid else basis.fisher_out)[last]
    size = fold.slices[k].stop - fold.slices[k].start
    told = basis.directions[:, :size].to(fisher) * fold.scales[k]
    metric: Tensor = told.T @ fisher @ told
    return metric


def _root(metric: Tensor) -> Tensor:
    """A square root of a positive semi-definite matrix, slightly lifted so that no direction is free."""
    eye = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    power, vectors = torch.linalg.eigh(metric + 1e-3 * metric.diagonal().mean() * eye)
    scaled: Tensor = vectors * power.clamp_min(0).sqrt()
    return scaled
