"""Git Re-Basin: permute an expert's units to match the anchor's, then average (Ainsworth et al., ICLR 2023).

    argmax over permutations of Σ_maps ⟨W_A, P_out W_B P_inᵀ⟩,   one linear assignment at a time

One permutation for the residual stream, one per layer for neurons, one per layer for KV groups with their query
heads. `match: weights` descends coordinate-wise until no permutation changes (the paper's weight matching, here from
the vocabulary, which both models share, and in a fixed order); `match: activations` maximises correlations on the
calibration texts instead. Narrower experts are zero-padded: unmatched units meet zeros.

Recovers permutations; not signs or rotations, which an RMSNorm stream allows too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polymerge.align import matching
from polymerge.align.correlation import Correlation
from polymerge.align.matching import assign, selection, widened
from polymerge.calibrate.calibration import Calibration
from polymerge.methods._lift import Lifted, Walk, lift, rows_of_all, shares
from polymerge.methods._maps import LayerMaps, Weights, head_maps, semi_orthogonal
from polymerge.methods._merge import Alignment, Emit, emit_average
from polymerge.methods.linear import padded
from polymerge.model.source import Source
from polymerge.model.spec import Spec


@dataclass(frozen=True)
class Method:
    """Permutation matching, then averaging. `match` as above; `sweeps` of weight matching at most; `rows` of text."""

    GRID: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"match": "activations"})

    weights: tuple[float, ...] = ()
    match: Literal["weights", "activations"] = "weights"
    sweeps: int = 10
    rows: int = 256

    def merge(
        self, experts: Sequence[Source], anchor: int, target: Spec, texts: Calibration, emit: Emit, seed: int
    ) -> None:
        """Emit the target's weights. Raises PreflightError where an expert cannot be padded to the target."""
        del seed
        weights = shares(self.weights, len(experts))
        lifted = lift(experts, target)
        streams = [padded(e, target) for e in lifted]
        layers: list[dict[int, LayerMaps]] = [{} for _ in range(target.layers)]
        for k in (k for k in range(len(experts)) if k != anchor):
            if self.match == "weights":
                p, maps = by_weights(lifted[anchor], lifted[k], target, self.sweeps)
            else:
                p, maps = by_activations(lifted[anchor], lifted[k], target, rows_of_all(texts, self.rows))
            streams[k] = semi_orthogonal(p)
            for host, found in maps.items():
                layers[host][k] = found
        emit_average(lifted, Alignment(streams, layers), weights, target, emit)


@torch.no_grad()
def by_weights(anchor: Lifted, other: Lifted, target: Spec, sweeps: int) -> tuple[Tensor, dict[int, LayerMaps]]:
    """Permutation of the stream (resid, target), and maps of the layers that both have."""
    a, b = anchor.outer(), other.outer()
    outside = b["embed.weight"].T @ a["embed.weight"] + b["head.weight"].T @ a["head.weight"]
    hosts = [h for h in anchor.hosts if h in other.hosts]
    stream, found = _permutation(outside, target.width), None
    maps: dict[int, LayerMaps] = {}
    for _ in range(sweeps):
        similarity, maps = outside.clone(), {}
        for host in hosts:
            wa, wb = anchor.layer(anchor.hosts.index(host)), other.layer(other.hosts.index(host))
            maps[host] = layer_maps(wb, wa, stream[:, : anchor.spec.width].to(outside), other, target)
            similarity += _stream_similarity(wb, wa, maps[host])
        stream = _permutation(similarity, target.width)
        now = [stream, *(m.down for m in maps.values()), *(m.q for m in maps.values())]
        if found is not None and all(torch.equal(x, y) for x, y in zip(found, now, strict=True)):
            break
        found = now
    return stream, maps


def layer_maps(wb: Weights, wa: Weights, stream: Tensor, other: Lifted, target: Spec) -> LayerMaps:
    """Neurons and heads of one layer matched by their weights, given the stream's map (resid, anchor resid)."""
    size, ratio = target.head_size, target.heads // target.kv_heads
    rows = {role: wb[f"{role}.weight"] @ stream @ wa[f"{role}.weight"].T for role in ("q", "k", "v", "gate", "up")}
    columns = {role: wb[f"{role}.weight"].T @ stream @ wa[f"{role}.weight"] for role in ("o", "down")}
    neurons = _permutation(rows["gate"] + rows["up"] + columns["down"], target.mlp)
    shared = _per_head(rows["k"] + rows["v"], size) / ratio
    similarity = _per_head(rows["q"] + columns["o"], size)
    similarity += shared.repeat_interleave(ratio, 0).repeat_interleave(ratio, 1)
    pairs = matching.heads(similarity, ratio, target.kv_heads)
    return LayerMaps(**head_maps(pairs, other.spec, target), gate=neurons, up=neurons, down=neurons)


def _stream_similarity(wb: Weights, wa: Weights, maps: LayerMaps) -> Tensor:
    """⟨residual dimension of B, of A⟩ (resid, anchor resid) summed over a layer's maps, inner units matched."""
    out = wa["q.weight"].new_zeros(len(wb["o.weight"]), len(wa["o.weight"]))
    for role in ("q", "k", "v", "gate", "up"):
        a, units = wa[f"{role}.weight"], getattr(maps, role).to(out)
        out += wb[f"{role}.weight"].T @ units[:, : len(a)] @ a
    for role in ("o", "down"):
        a, units = wa[f"{role}.weight"], getattr(maps, role).to(out)
        out += wb[f"{role}.weight"] @ units[:, : a.shape[1]] @ a.T
    return out


@torch.no_grad()
def by_activations(anchor: Lifted, other: Lifted, target: Spec, tokens: Tensor) -> tuple[Tensor, dict[int, LayerMaps]]:
    """The same from correlations on texts."""
    device = anchor.source.device
    walk = Walk([anchor, other], tokens)
    states = Correlation(other.spec.width, anchor.spec.width, device)
    maps: dict[int, LayerMaps] = {}
    ratio = target.heads // target.kv_heads
    for x, y in zip(*walk.states, strict=True):
        states.add(y, x)
    for host in range(target.layers):
        hidden = Correlation(other.spec.mlp, anchor.spec.mlp, device)
        mixed = Correlation(other.spec.heads * target.head_size, anchor.spec.heads * target.head_size, device)
        both = False
        for traces in walk.layer(host):
            both = len(traces) > 1
            if both:
                hidden.add(traces[1].hidden, traces[0].hidden)
                mixed.add(traces[1].mixed, traces[0].mixed)
        for x, y in zip(*walk.states, strict=True):
            states.add(y, x)
        if both:
            neurons = _permutation(hidden.matrix(), target.mlp)
            pairs = matching.heads(_per_head(mixed.matrix(), target.head_size), ratio, target.kv_heads)
            maps[host] = LayerMaps(**head_maps(pairs, other.spec, target), gate=neurons, up=neurons, down=neurons)
    return _permutation(states.matrix(), target.width), maps


def _permutation(similarity: Tensor, targets: int) -> Tensor:
    return selection(assign(widened(similarity, targets)), len(similarity), targets)


def _per_head(x: Tensor, size: int) -> Tensor:
    """Similarity of heads: the sum over equal coordinates inside them."""
    blocks = x.view(x.shape[0] // size, size, x.shape[1] // size, size)
    return blocks.diagonal(dim1=1, dim2=3).sum(-1)
