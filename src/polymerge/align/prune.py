"""Which heads or neurons to keep when a layer has more than the target may hold: group optimal brain surgeon.

For a writer Y = X W, removing the inputs g and re-solving for the rest raises the squared error by
tr(W_g M W_gᵀ (H⁻¹_gg)⁻¹), H = XᵀX + λ (Hassibi & Stork 1993, groups: Frantar et al. 2022).
M weighs the output directions: with the Fisher matrix of the boundary, the cost is in nats of KL, so that heads and
neurons of different experts compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Writer:
    """One expert's share of a writer: damped Gram matrix (in, in) and metric-weighted solution (in, out)."""

    gram: Tensor
    solution: Tensor


def keep_groups(writers: Sequence[Writer], group: int, keep: int, step: float = 0.1) -> Tensor:
    """Indices (ascending) of the `keep` input groups of `group` consecutive inputs that are worth most.

    Groups go one by one while few are left to remove, else in lots of `step` of those that remain.
    """
    inputs = len(writers[0].gram)
    alive = torch.arange(inputs // group)
    inverses = [torch.linalg.inv(w.gram) for w in writers]
    solutions = [w.solution.clone() for w in writers]
    while len(alive) > keep:
        costs = torch.stack([_costs(i, s, group) for i, s in zip(inverses, solutions, strict=True)]).sum(0)
        lot = min(len(alive) - keep, max(1, int(step * len(alive))))
        order = torch.argsort(costs, stable=True)
        drop = members(order[:lot], group)
        stay = members(order[lot:].sort().values, group)
        for k, (inverse, solution) in enumerate(zip(inverses, solutions, strict=True)):
            gain = torch.linalg.solve(
                inverse[drop][:, drop], torch.cat([inverse[drop][:, stay], solution[drop]], dim=1)
            )
            update = inverse[stay][:, drop] @ gain
            inverses[k] = inverse[stay][:, stay] - update[:, : len(stay)]
            solutions[k] = solution[stay] - update[:, len(stay) :]
        alive = alive[order[lot:].sort().values.cpu()]
    return alive


def members(groups: Tensor, size: int) -> Tensor:
    """Indices of the members of groups of `size` consecutive entries."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _costs(inverse: Tensor, solution: Tensor, group: int) -> Tensor:
    """Error increase of removing each group alone (groups,)."""
    count = len(inverse) // group
    index = torch.arange(count)
    blocks = inverse.view(count, group, count, group)[index, :, index, :]
    rows = solution.view(count, group, -1)
    costs: Tensor = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))
    return costs
