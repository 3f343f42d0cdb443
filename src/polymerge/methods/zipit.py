"""ZipIt: merge the most correlated units of all experts, across and within them, until the target's size is reached.

    x' = M x,  x = [x_1; …; x_K];   M averages the members of each cluster, U gives every member its cluster's value
    W' = M_out diag(W_1, …, W_K) U_in

"ZipIt! Merging Models from Different Tasks without Training" (Stoica et al., ICLR 2024), its greedy matching without
a within-model budget (the paper's β = 1). One clustering for the residual stream (correlations averaged over block
boundaries), one per layer for neurons and one for KV groups, whose query heads are put in the order of the cluster's
first member. Logits are averaged. A target as wide as all experts together holds them side by side, unmerged. Layers
are spread evenly; where an expert has none it is the identity, which the average of the streams already says.

Merges duplicates in any order; does not see signs or rotations. Shares are the clusters': there are no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polymerge.align.correlation import Correlation
from polymerge.align.matching import GroupPair, assign, clusters
from polymerge.calibrate.calibration import Calibration
from polymerge.methods._lift import Lifted, Walk, lift, rows_of_all
from polymerge.methods._maps import LayerMaps, Stream, head_maps
from polymerge.methods._merge import Alignment, Emit, emit_average
from polymerge.model.source import Source
from polymerge.model.spec import Spec


@dataclass(frozen=True)
class Method:
    """ZipIt on stream, neurons and heads. `alpha` damps repeated merges of one unit; `rows` of text."""

    GRID: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"alpha": 0.3})

    alpha: float = 1.0
    rows: int = 256

    def merge(
        self, experts: Sequence[Source], anchor: int, target: Spec, texts: Calibration, emit: Emit, seed: int
    ) -> None:
        """Emit the target's weights. Raises PreflightError for an expert that is not llama-like."""
        del anchor, seed
        lifted = lift(experts, target)
        alignment = zipped(lifted, target, rows_of_all(texts, self.rows), self.alpha)
        emit_average(lifted, alignment, [1 / len(experts)] * len(experts), target, emit, add=True)


@torch.no_grad()
def zipped(lifted: Sequence[Lifted], target: Spec, tokens: Tensor, alpha: float) -> Alignment:
    """Streams and maps of all experts; both carry the shares of the clusters."""
    walk, device = Walk(lifted, tokens), lifted[0].source.device
    width = sum(e.spec.width for e in lifted)
    boundaries = [_boundary(walk, width)]
    layers = []
    for host in range(target.layers):
        present = [k for k, e in enumerate(lifted) if host in e.hosts]
        units = sum(lifted[k].spec.mlp for k in present)
        coordinates = sum(lifted[k].spec.heads for k in present) * target.head_size
        hidden, mixed = Correlation(units, units, device), Correlation(coordinates, coordinates, device)
        for traces in walk.layer(host):
            if present:
                h, m = (torch.cat([getattr(traces[k], what) for k in present], dim=-1) for what in ("hidden", "mixed"))
                hidden.add(h, h)
                mixed.add(m, m)
        boundaries.append(_boundary(walk, width))
        layers.append(_layer([(k, lifted[k]) for k in present], hidden, mixed, target, alpha) if present else {})
    return Alignment(_streams(lifted, torch.stack(boundaries).mean(0), target, alpha), layers)


def _boundary(walk: Walk, width: int) -> Tensor:
    states = Correlation(width, width, walk.lifted[0].source.device)
    for batches in zip(*walk.states, strict=True):
        x = torch.cat(batches, dim=-1)
        states.add(x, x)
    return states.matrix()


def _streams(lifted: Sequence[Lifted], correlation: Tensor, target: Spec, alpha: float) -> list[Stream]:
    groups = clusters(correlation, target.width, alpha)
    # Unused dimensions lower the root mean square that the norm divides by.
    scale = (target.width / len(groups)) ** 0.5
    mean, member = _cluster_maps(groups, len(correlation), target.width)
    # A tied head reads what the embedding writes: cluster means where it wants the mean over experts.
    size = torch.ones(target.width, dtype=torch.float64)
    size[: len(groups)] = torch.tensor([float(len(g)) for g in groups])
    ratio = len(lifted) * scale**2 / size
    parts = [e.spec.width for e in lifted]
    return [Stream(m * scale, u / scale, ratio) for m, u in zip(mean.split(parts), member.split(parts), strict=True)]


def _cluster_maps(groups: Sequence[Sequence[int]], units: int, targets: int) -> tuple[Tensor, Tensor]:
    """Mᵀ and U (unit, target): one over the size of the cluster, and one, for its members."""
    mean, member = (torch.zeros(units, targets, dtype=torch.float64) for _ in "mu")
    for j, group in enumerate(groups):
        member[list(group), j] = 1.0
        mean[list(group), j] = 1 / len(group)
    return mean, member


def _layer(
    present: Sequence[tuple[int, Lifted]], hidden: Correlation, mixed: Correlation, target: Spec, alpha: float
) -> dict[int, LayerMaps]:
    """Maps of the experts that have this layer."""
    mean, member = _cluster_maps(clusters(hidden.matrix(), target.mlp, alpha), len(hidden.cross), target.mlp)
    parts = [e.spec.mlp for _, e in present]
    neurons = zip(mean.split(parts), member.split(parts), strict=True)
    heads = _heads([e for _, e in present], mixed.matrix(), target, alpha)
    return {k: LayerMaps(**h, gate=m, up=m, down=u) for (k, _), h, (m, u) in zip(present, heads, neurons, strict=True)}


def _heads(experts: Sequence[Lifted], correlation: Tensor, target: Spec, alpha: float) -> list[dict[str, Tensor]]:
    """Maps of q, k, v, o by expert, from correlations between all head outputs."""
    size, ratio = target.head_size, target.heads // target.kv_heads
    heads = len(correlation) // size
    per_head = correlation.view(heads, size, heads, size).diagonal(dim1=1, dim2=3).mean(-1)
    blocks = per_head.view(heads // ratio, ratio, heads // ratio, ratio)
    count = heads // ratio
    orders = {(i, j): [a for a, _ in sorted(assign(blocks[j, :, i, :]), key=lambda pair: pair[1])]
              for i in range(count) for j in range(count)}  # fmt: skip
    similarity = torch.tensor(
        [
            [sum(float(blocks[j, a, i, p]) for p, a in enumerate(orders[i, j])) for j in range(count)]
            for i in range(count)
        ]
    )
    first = [sum(e.groups for e in experts[:n]) for n in range(len(experts) + 1)]
    out = []
    found = clusters((similarity + similarity.T) / 2, target.kv_heads, alpha)
    for n, expert in enumerate(experts):
        pairs = [
            (GroupPair(i - first[n], j, tuple(orders[group[0], i])), len(group))
            for j, group in enumerate(found)
            for i in group
            if first[n] <= i < first[n + 1]
        ]
        maps = head_maps([pair for pair, _ in pairs], expert.spec, target)
        shares = torch.ones(target.kv_heads, dtype=torch.float64)
        shares[[pair.target for pair, _ in pairs]] = torch.tensor([1 / s for _, s in pairs], dtype=torch.float64)
        wide = {"q": shares.repeat_interleave(ratio * size), "k": shares.repeat_interleave(size)}
        out.append({"q": maps["q"] * wide["q"], "k": maps["k"] * wide["k"], "v": maps["v"] * wide["k"], "o": maps["o"]})
    return out
