"""One-to-one and many-to-one matching of units (neurons, heads, residual dimensions) by similarity.

    assign     argmax_σ Σ_i S[i, σ(i)]      linear assignment (Kuhn 1955), as in Git Re-Basin (Ainsworth et al. 2023)
    heads      the same over KV groups, with the best order of query heads inside each pair of groups
    clusters   greedy agglomeration of units, most correlated first: ZipIt (Stoica et al. 2024)

What one-to-one matching on correlations can recover: a permutation. What it cannot: signs (unless |S| is given),
rotations, and units that one model has split over several of the other's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(similarity: Float[Tensor, "source target"]) -> list[tuple[int, int]]:
    """Pairs (source, target) of the best one-to-one matching; min(source, target) of them, by source."""
    rows, columns = linear_sum_assignment(similarity.detach().double().cpu().numpy(), maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def widened(similarity: Float[Tensor, "source n"], targets: int) -> Float[Tensor, "source targets"]:
    """Columns of zeros for units that the target has and the anchor lacks: whatever goes there meets nothing."""
    return torch.cat([similarity, similarity.new_zeros(len(similarity), targets - similarity.shape[1])], dim=1)


def selection(pairs: Sequence[tuple[int, int]], sources: int, targets: int) -> Float[Tensor, "source target"]:
    """The 0/1 matrix of a matching, float64."""
    out = torch.zeros(sources, targets, dtype=torch.float64)
    for i, j in pairs:
        out[i, j] = 1.0
    return out


@dataclass(frozen=True)
class GroupPair:
    """KV group `source` plays the part of group `target`; `order[a]` is the source's query head at place a."""

    source: int
    target: int
    order: tuple[int, ...]


def heads(similarity: Float[Tensor, "head other"], ratio: int, groups: int) -> list[GroupPair]:
    """Match KV groups of `ratio` query heads each, given the similarity of query heads.

    `groups` counts the target's groups; those past the anchor's are empty.
    """
    sources, others = len(similarity) // ratio, similarity.shape[1] // ratio
    blocks = similarity.view(sources, ratio, others, ratio)
    total = similarity.new_zeros(sources, others)
    orders: dict[tuple[int, int], tuple[int, ...]] = {}
    for i in range(sources):
        for j in range(others):
            pairs = assign(blocks[i, :, j, :])
            total[i, j] = sum(float(blocks[i, a, j, b]) for a, b in pairs)
            orders[i, j] = tuple(a for a, _ in sorted(pairs, key=lambda pair: pair[1]))
    plain = tuple(range(ratio))
    return [GroupPair(i, j, orders.get((i, j), plain)) for i, j in assign(widened(total, groups))]


def clusters(similarity: Float[Tensor, "unit unit"], keep: int, alpha: float = 1.0) -> list[list[int]]:
    """Merge the most similar clusters until `keep` are left.

    A merged cluster is as similar to another as its less similar part, times `alpha` for each merge (the released code
    of ZipIt; below 1 it damps repeated merges of one unit).
    """
    members = [[i] for i in range(len(similarity))]
    s = similarity.detach().double().cpu().clone()
    s.fill_diagonal_(-torch.inf)
    alive = torch.ones(len(s), dtype=torch.bool)
    best, at = s.max(dim=1)
    for _ in range(max(0, len(s) - keep)):
        i = int(torch.where(alive, best, -torch.inf).argmax())
        j = int(at[i])
        i, j = min(i, j), max(i, j)
        row = alpha * torch.minimum(s[i], s[j])
        row[i] = -torch.inf
        s[i], s[:, i] = row, row
        s[j], s[:, j] = -torch.inf, -torch.inf
        alive[j] = False
        members[i] += members[j]
        # Only rows that pointed at the pair, and the merged row, can have another nearest cluster now.
        stale = alive & ((at == i) | (at == j))
        stale[i] = True
        best[stale], at[stale] = s[stale].max(dim=1)
        better = alive & (s[:, i] > best)
        best, at = torch.where(better, s[:, i], best), torch.where(better, i, at)
    return [sorted(m) for m, live in zip(members, alive.tolist(), strict=True) if live]
