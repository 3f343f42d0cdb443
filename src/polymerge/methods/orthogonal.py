"""Generalized linear mode connectivity: align by the symmetries that a transformer really has, then average.

    residual stream  rotation Q by Procrustes of activations at all block boundaries; semi-orthogonal at unequal widths
    heads            KV groups and query heads matched on their QK and OV circuits, which no gauge changes; then
                     values rotated, rotary pairs of queries and keys multiplied by a complex factor each
    neurons          permutation by |correlation|, with the reciprocal scale (and sign) of up and down

"Generalized Linear Mode Connectivity for Transformers" (Theus et al., NeurIPS 2025) for stream, heads and permutation;
scales and phases are added here, as SwiGLU and RoPE leave them free. γ is absorbed first: only then is a rotation free.

Circuits, D the residual dimension: OV_h = O_h V_h (D, D); QK_h = pairs q_p k̄_pᵀ (pair, D, D) as complex numbers. Their
inner products need hd × hd matrices only: ⟨O_a V_a, O_b V_b⟩ = Σ (O_aᵀ O_b) ∘ (V_a V_bᵀ).

Not recovered: general linear (not orthogonal) gauges of a head's values, and rotations of streams of low rank. q/k
norms (Qwen3) fix the phases: queries and keys are left as they are there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polymerge.align import matching
from polymerge.align.correlation import Correlation
from polymerge.align.matching import GroupPair, assign, selection, widened
from polymerge.align.procrustes import as_complex, orthogonal, pair_block, pair_factors
from polymerge.calibrate.calibration import Calibration
from polymerge.methods._lift import Lifted, Walk, hold, lift, rows_of_all, shares
from polymerge.methods._maps import LayerMaps, Stream, Weights, head_maps, semi_orthogonal
from polymerge.methods._merge import Alignment, Emit, emit_average
from polymerge.methods.linear import padded
from polymerge.model.source import Source
from polymerge.model.spec import Spec


@dataclass(frozen=True)
class Method:
    """Orthogonal alignment, then averaging. `rows` of text for the activations."""

    weights: tuple[float, ...] = ()
    rows: int = 256

    def merge(
        self, experts: Sequence[Source], anchor: int, target: Spec, texts: Calibration, emit: Emit, seed: int
    ) -> None:
        """Emit the target's weights. Raises PreflightError where the target does not hold the anchor."""
        del seed
        weights = shares(self.weights, len(experts))
        lifted = lift(experts, target)
        emit_average(lifted, align(lifted, anchor, target, rows_of_all(texts, self.rows)), weights, target, emit)


@torch.no_grad()
def align(lifted: Sequence[Lifted], anchor: int, target: Spec, tokens: Tensor) -> Alignment:
    """Streams and maps of all experts, the anchor's as they are."""
    hold(lifted[anchor], target)
    streams = [padded(lifted[anchor], target)] * len(lifted)
    layers: list[dict[int, LayerMaps]] = [{} for _ in range(target.layers)]
    for k in (k for k in range(len(lifted)) if k != anchor):
        streams[k], neurons = from_activations(lifted[anchor], lifted[k], target, tokens)
        for host, (gate, up, down) in neurons.items():
            a, b = (e.layer(e.hosts.index(host)) for e in (lifted[anchor], lifted[k]))
            heads = from_circuits(_seen(a, streams[anchor]), _seen(b, streams[k]), lifted[k].spec, target)
            layers[host][k] = LayerMaps(**heads, gate=gate, up=up, down=down)
    return Alignment(streams, layers)


def from_activations(
    anchor: Lifted, other: Lifted, target: Spec, tokens: Tensor
) -> tuple[Stream, dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """The stream's rotation, and maps of gate, up and down in the layers that both have."""
    walk, device = Walk([anchor, other], tokens), anchor.source.device
    cross = torch.zeros(other.spec.width, target.width, dtype=torch.float64, device=device)
    gram = torch.zeros(other.spec.width, other.spec.width, dtype=torch.float64, device=device)
    neurons: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def count() -> None:
        """Add this boundary, both streams brought to unit power so that no depth outweighs the others."""
        x, y = (torch.cat([s.flatten(0, 1) for s in states]).double() for states in walk.states)
        cross[:, : x.shape[1]] += y.T @ x / (x.norm() * y.norm()).clamp_min(1e-300)
        gram.add_(y.T @ y / y.pow(2).sum().clamp_min(1e-300))

    count()
    for host in range(target.layers):
        hidden = Correlation(other.spec.mlp, anchor.spec.mlp, device)
        both = False
        for traces in walk.layer(host):
            if both := len(traces) > 1:
                hidden.add(traces[1].hidden, traces[0].hidden)
        count()
        if both:
            neurons[host] = _neurons(hidden, target.mlp)
    q = orthogonal(cross)
    kept = float((q.T @ gram @ q).trace() / gram.trace()) if other.spec.width > target.width else 1.0
    return semi_orthogonal(q, kept), neurons


def _neurons(hidden: Correlation, targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Permutation, and the scale of up that gives a matched neuron the sign and size of its partner."""
    correlation = hidden.matrix()
    own, theirs = hidden.rms()
    pairs = assign(widened(correlation.abs(), targets))
    choice, scale = selection(pairs, len(correlation), targets), torch.ones(len(correlation), dtype=torch.float64)
    for i, j in pairs:
        if j < correlation.shape[1] and float(own[i]) > 0 and float(theirs[j]) > 0 and float(correlation[i, j]) != 0:
            scale[i] = torch.sign(correlation[i, j]).cpu() * (theirs[j] / own[i]).cpu()
    return choice, choice * scale[:, None], choice / scale[:, None]


def _seen(weights: Weights, stream: Stream) -> Weights:
    """q, k, v with their biases as one more input, and o, as the target's stream sees them."""
    out = {}
    for role in ("q", "k", "v"):
        w = weights[f"{role}.weight"].double() @ stream.read.to(weights["q.weight"].device)
        bias = weights.get(f"{role}.bias")
        out[role] = w if bias is None else torch.cat([w, bias[:, None].double()], dim=1)
    return out | {"o": stream.write.T.to(out["q"].device) @ weights["o.weight"].double(), **_norms(weights)}


def _norms(weights: Weights) -> Weights:
    return {role: weights[role] for role in ("q_norm.weight",) if role in weights}


def from_circuits(a: Weights, b: Weights, spec: Spec, target: Spec) -> dict[str, Tensor]:
    """Maps of q, k, v, o of expert b that bring its heads to the anchor's (`_seen` weights of both)."""
    size, ratio = target.head_size, target.heads // target.kv_heads
    pairs = matching.heads(circuit_similarity(b, a, size, ratio), ratio, target.kv_heads)
    anchors = len(a["k"]) // size
    eye = torch.eye(size, dtype=torch.float64)
    blocks = {}
    for pair in pairs:
        if pair.target < anchors:
            q, k = (eye, eye) if "q_norm.weight" in a else _phases(a, b, pair, size, ratio)
            v, o = _values(a, b, pair, size, ratio)
            blocks[pair.source] = (q, k, v, o)
    return head_maps(pairs, spec, target, blocks)


def circuit_similarity(b: Weights, a: Weights, size: int, ratio: int) -> Tensor:
    """Cosine of OV circuits plus cosine of QK circuits (head of b, head of a)."""

    def ov(x: Weights, y: Weights) -> Tensor:
        oo = torch.einsum("dax,dby->abxy", x["o"].unflatten(1, (-1, size)), y["o"].unflatten(1, (-1, size)))
        vv = torch.einsum("ixd,jyd->ijxy", x["v"].unflatten(0, (-1, size)), y["v"].unflatten(0, (-1, size)))
        return (oo * _expand(vv, ratio)).sum((2, 3))

    def qk(x: Weights, y: Weights) -> Tensor:
        (xq, yq), (xk, yk) = ([as_complex(w[role].unflatten(0, (-1, size))) for w in (x, y)] for role in "qk")
        qq = torch.einsum("apd,bpd->abp", xq, yq.conj())
        kk = torch.einsum("ipd,jpd->ijp", xk.conj(), yk)
        return (qq * _expand(kk, ratio)).real.sum(2)

    return _cosine(ov, b, a) + _cosine(qk, b, a)


def _cosine(product: Callable[[Weights, Weights], Tensor], b: Weights, a: Weights) -> Tensor:
    rows, columns = [product(x, x).diagonal().clamp_min(1e-200).rsqrt() for x in (b, a)]
    scaled: Tensor = product(b, a) * rows[:, None] * columns[None]
    return scaled


def _expand(x: Tensor, ratio: int) -> Tensor:
    return x.repeat_interleave(ratio, 0).repeat_interleave(ratio, 1)


def _group(
    w: Weights, index: int, order: Sequence[int], size: int, ratio: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q (head, hd, n), k (hd, n), v (hd, n), o (head, hd, resid) of one KV group."""
    heads = [index * ratio + a for a in order]
    q = w["q"].unflatten(0, (-1, size))[heads]
    o = w["o"].T.unflatten(0, (-1, size))[heads]
    return q, w["k"].unflatten(0, (-1, size))[index], w["v"].unflatten(0, (-1, size))[index], o


def _phases(a: Weights, b: Weights, pair: GroupPair, size: int, ratio: int) -> tuple[Tensor, Tensor]:
    own, theirs = _group(b, pair.source, pair.order, size, ratio), _group(a, pair.target, range(ratio), size, ratio)
    q, k = pair_factors(as_complex(own[0]), as_complex(own[1]), as_complex(theirs[0]), as_complex(theirs[1]))
    return pair_block(q).cpu(), pair_block(k).cpu()


def _values(a: Weights, b: Weights, pair: GroupPair, size: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Rotation of a group's values, and the scale that gives values and outputs the anchor's proportion."""
    _, _, v, o = _group(b, pair.source, pair.order, size, ratio)
    _, _, va, oa = _group(a, pair.target, range(ratio), size, ratio)
    norms = [float(x.norm()) for x in (v, o, va, oa)]
    scale = 1.0 if min(norms) == 0 else ((norms[2] * norms[1]) / (norms[3] * norms[0])) ** 0.5
    cross = v @ va.T / max(norms[0] * norms[2], 1e-300)
    cross = cross + torch.einsum("axd,ayd->xy", o, oa) / max(norms[1] * norms[3], 1e-300)
    rotation = orthogonal(cross).cpu()
    return rotation * scale, rotation / scale
