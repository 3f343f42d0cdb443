"""OT fusion: transport an expert's units onto the anchor's by optimal transport of activations, then average.

    W' = (1 − w) W_A + w · mean_outᵀ W_B share_in,   mean = m P, share = n P,   P = plan(1 − correlation)

OTFusion (Singh & Jaggi, NeurIPS 2020); for transformers "Transformer Fusion with Optimal Transport" (Imfeld et al.,
ICLR 2024): soft Sinkhorn maps, and where residual branches meet, the average of their maps. Here one stream means one
map: the average of the plans at all block boundaries. Heads are transported as wholes (KV groups by the cost of the
best plan of their values); value dimensions inside a head have a plan of their own; queries and keys keep their
places inside a head, as rotary pairs may not be mixed.

Corrected against the public code, which multiplies P by n on both sides: at unequal widths that scales maps by n/m.
Works on the anchor's units: what the target has beyond them stays empty. `epsilon: 0` gives the exact plan. Recovers
permutations (exactly for ε = 0; blurred otherwise); not signs or rotations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polymerge.align import transport
from polymerge.align.correlation import Correlation
from polymerge.align.matching import assign
from polymerge.calibrate.calibration import Calibration
from polymerge.methods._lift import Lifted, Walk, hold, lift, plan_of, rows_of_all, shares
from polymerge.methods._maps import LayerMaps, Stream
from polymerge.methods._merge import Alignment, Emit, emit_average
from polymerge.methods.linear import padded
from polymerge.model.source import Source
from polymerge.model.spec import Spec


@dataclass(frozen=True)
class Method:
    """Optimal transport on activations. `epsilon`: Sinkhorn's regularisation, 0 for exact plans; `rows` of text."""

    GRID: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"epsilon": 0.2}, {"epsilon": 0.02})

    weights: tuple[float, ...] = ()
    epsilon: float = 0.06
    rows: int = 256

    def merge(
        self, experts: Sequence[Source], anchor: int, target: Spec, texts: Calibration, emit: Emit, seed: int
    ) -> None:
        """Emit the target's weights. Raises PreflightError where the target does not hold the anchor."""
        del seed
        weights = shares(self.weights, len(experts))
        lifted = lift(experts, target)
        hold(lifted[anchor], target)
        streams = [padded(lifted[anchor], target)] * len(experts)
        layers: list[dict[int, LayerMaps]] = [{} for _ in range(target.layers)]
        tokens = rows_of_all(texts, self.rows)
        for k in (k for k in range(len(experts)) if k != anchor):
            streams[k], maps = transported(lifted[anchor], lifted[k], target, tokens, self.epsilon)
            for host, found in maps.items():
                layers[host][k] = found
        emit_average(lifted, Alignment(streams, layers), weights, target, emit)


@torch.no_grad()
def transported(
    anchor: Lifted, other: Lifted, target: Spec, tokens: Tensor, epsilon: float
) -> tuple[Stream, dict[int, LayerMaps]]:
    """The stream of an expert, and its maps in the layers that both have."""
    walk, device, size = Walk([anchor, other], tokens), anchor.source.device, target.head_size
    plans = [plan_of(1 - _boundary(walk), epsilon)]
    maps: dict[int, LayerMaps] = {}
    for host in range(target.layers):
        hidden = Correlation(other.spec.mlp, anchor.spec.mlp, device)
        mixed = Correlation(other.spec.heads * size, anchor.spec.heads * size, device)
        both = False
        for traces in walk.layer(host):
            if both := len(traces) > 1:
                hidden.add(traces[1].hidden, traces[0].hidden)
                mixed.add(traces[1].mixed, traces[0].mixed)
        plans.append(plan_of(1 - _boundary(walk), epsilon))
        if both:
            coupling = plan_of(1 - hidden.matrix(), epsilon)
            mean = _columns(transport.mean_map(coupling), target.mlp)
            share = _columns(transport.share_map(coupling), target.mlp)
            heads = _heads(1 - mixed.matrix(), target, epsilon)
            maps[host] = LayerMaps(**heads, gate=mean, up=mean, down=share)
    coupling = torch.stack(plans).mean(0)
    scale = (target.width / anchor.spec.width) ** 0.5  # the anchor's own, where the target is wider
    stream = Stream(
        _columns(transport.mean_map(coupling) * scale, target.width),
        _columns(transport.share_map(coupling) / scale, target.width),
        ratio=scale**2 * anchor.spec.width / other.spec.width,
    )
    return stream, maps


def _boundary(walk: Walk) -> Tensor:
    """Correlations (other, anchor) of the streams where the walk stands."""
    anchor, other = walk.lifted
    states = Correlation(other.spec.width, anchor.spec.width, anchor.source.device)
    for x, y in zip(*walk.states, strict=True):
        states.add(y, x)
    return states.matrix()


def _heads(cost: Tensor, target: Spec, epsilon: float) -> dict[str, Tensor]:
    """Maps of q, k, v, o from the cost between head outputs (other head·hd, anchor head·hd)."""
    size, ratio = target.head_size, target.heads // target.kv_heads
    blocks = cost.view(len(cost) // size, size, -1, size).transpose(1, 2)
    each = (blocks * plan_of(blocks, epsilon)).sum((2, 3))
    n, m = (heads // ratio for heads in each.shape)
    orders, means = {}, []
    for i in range(n):
        for j in range(m):
            inside = each[i * ratio : (i + 1) * ratio, j * ratio : (j + 1) * ratio]
            orders[i, j] = assign(-inside)
            means.append(torch.stack([blocks[i * ratio + a, j * ratio + b] for a, b in orders[i, j]]).mean(0))
    average = torch.stack(means)
    values = plan_of(average, epsilon)
    group = plan_of((average * values).sum((1, 2)).view(n, m), epsilon)
    mean, share, inside = transport.mean_map(group), transport.share_map(group), transport.mean_map(values)
    eye = torch.eye(size, dtype=cost.dtype, device=cost.device)
    out = {
        "q": cost.new_zeros(n * ratio, size, target.heads, size), "k": cost.new_zeros(n, size, target.kv_heads, size),
        "v": cost.new_zeros(n, size, target.kv_heads, size), "o": cost.new_zeros(n * ratio, size, target.heads, size),
    }  # fmt: skip
    for (i, j), pairs in orders.items():
        out["k"][i, :, j] = mean[i, j] * eye
        out["v"][i, :, j] = mean[i, j] * inside[i * m + j]
        for a, b in pairs:
            out["q"][i * ratio + a, :, j * ratio + b] = mean[i, j] * eye
            out["o"][i * ratio + a, :, j * ratio + b] = share[i, j] * inside[i * m + j]
    return {role: x.flatten(2).flatten(0, 1) for role, x in out.items()}


def _columns(x: Tensor, total: int) -> Tensor:
    return F.pad(x, (0, total - x.shape[1]))
