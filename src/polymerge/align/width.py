"""Which directions of an expert's residual stream to keep: balanced truncation between what is there and what is heard.

Over the block boundaries accumulate C = E[s sᵀ] of the residual states and F = E[g gᵀ] of the gradients of log p(y)
with respect to them, y drawn from the expert itself. F is the Fisher information: an error δ at that boundary costs
½ δᵀ F δ nats of KL to first order. Readers divide a state by its size, so both are taken relative to it (`heed`). A
target that keeps r functionals Aᵀs can say of the rest what regression tells:
with C = LLᵀ and U the eigenvectors of Lᵀ F L, best first, the error tr F·Cov(s | Aᵀs) is least for A = L⁻ᵀ U_r, and is
the sum of the other eigenvalues (balanced truncation: Moore 1981; both Gramians measured on text here). What is told of
s is then ŝ = L U_r U_rᵀ L⁻¹ s. The target's slice holds its coordinates in the orthonormal basis Q = qr(L U), so that
its norm, by which an RMSNorm divides, is that of ŝ, and of s itself where all are kept.

The gradients come from one reverse sweep: layer inputs are cached on the way up, each layer is replayed and
differentiated alone on the way down, so one layer is in memory at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polymerge.model import decoder
from polymerge.model.source import Source
from polymerge.model.spec import Spec

UNSURE, HOTTEST = 1.5, 64.0
"""Nats of entropy that predictions need so that their gradients tell what is heard; the highest temperature."""
NOTHING = 1e-4
"""Mean square of a state, relative to the median, below which it counts as empty."""
STEADY = 0.1
"""Energy of the constant dimension where the stream does not hold everything, relative to all that it does hold."""


@dataclass(frozen=True)
class Basis:
    """What to keep of a residual stream, best first.

    Attributes:
        directions: Q, columns orthonormal; `triangle`: R, with Q R = L U.
        functionals: L⁻ᵀ U: n of them tell all that a slice of n dimensions can.
        scores: sum to 1.
        fisher_mid: per layer, the Fisher matrix (resid, resid) after its attention, for errors that are weighted by
            `heed`; `fisher_out` after its MLP.
        scale: typical size of the stream's entries, the geometric mean over the boundaries.
    """

    directions: Float[Tensor, "resid resid"]
    triangle: Float[Tensor, "resid resid"]
    functionals: Float[Tensor, "resid resid"]
    scores: Float[Tensor, " resid"]
    fisher_mid: tuple[Tensor, ...]
    fisher_out: tuple[Tensor, ...]
    scale: float

    def encoder(self, size: int) -> Float[Tensor, "resid size"]:
        """P: Pᵀs are the coordinates of ŝ in the first `size` directions."""
        return self.functionals[:, :size] @ self.triangle[:size, :size].mT


def centred(source: Source, x: Float[Tensor, "... resid"]) -> Float[Tensor, "... resid"]:
    """The state without its mean where the expert has LayerNorm: no reader of such a stream can see the mean."""
    return x - x.mean(-1, keepdim=True) if source.spec.norm == "layer" else x


def residual_basis(
    source: Source,
    tokens: Int[Tensor, "row time"],
    scored: Tensor,
    generator: torch.Generator,
    batch: int = 16,
) -> Basis:
    """Basis and Fisher matrices of one expert from its own texts; `scored` (time,) marks the positions that count."""
    spec = source.spec
    width, layers = spec.width, spec.layers
    present = torch.zeros(2 * layers + 1, width, width, dtype=torch.float64, device=source.device)
    heard = torch.zeros_like(present)
    outer = source.outer()
    inputs: list[list[Tensor]] = []
    batches = [chunk.to(source.device) for chunk in tokens.split(batch)]
    states = [centred(source, decoder.embed(spec, outer, chunk)) for chunk in batches]
    with torch.no_grad():
        for index in range(layers):
            inputs.append(states)
            weights = source.layer(index)
            states = [centred(source, decoder.layer(spec.at(index), weights, x).out) for x in states]
    temperature = _temperature(source, outer, states, scored)
    upstream = [_felt(x, _sampled_gradient(source, outer, x, scored, generator, temperature)) for x in states]
    for x, g in zip(states, upstream, strict=True):
        _accumulate(present[2 * layers], heard[2 * layers], x, g)
    for index in reversed(range(layers)):
        weights = source.layer(index)
        downstream = []
        for x, g in zip(inputs[index], upstream, strict=True):
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                trace = decoder.layer(spec.at(index), weights, leaf)
                at_input, at_mid = torch.autograd.grad(trace.out, (leaf, trace.mid), g)
            mid = centred(source, trace.mid.detach())
            downstream.append(_felt(x, at_input))
            _accumulate(present[2 * index + 1], heard[2 * index + 1], mid, _felt(mid, at_mid))
            _accumulate(present[2 * index], heard[2 * index], x, downstream[-1])
        upstream = downstream
    count = tokens.numel()
    fisher = heard / count
    directions, triangle, functionals, scores = _balance(_normalised(present), _normalised(heard))
    return Basis(
        directions=directions,
        triangle=triangle,
        functionals=functionals,
        scores=scores,
        fisher_mid=tuple(fisher[2 * i + 1] for i in range(layers)),
        fisher_out=tuple(fisher[2 * i + 2] for i in range(layers)),
        scale=float((present.diagonal(dim1=1, dim2=2).mean(1) / count).clamp_min(1e-30).log().mean().div(2).exp()),
    )


def _temperature(source: Source, outer: dict[str, Tensor], states: Sequence[Tensor], scored: Tensor) -> float:
    """By which the logits are divided before y is drawn: 1, doubled until the predictions are unsure on average.

    An expert that is always sure draws what it would have said anyway, from which no gradient comes: the Fisher
    information of such predictions is that of the few rows on which it errs.
    """
    unsure = min(UNSURE, 0.5 * math.log(source.spec.vocab))
    temperature = 1.0
    while temperature < HOTTEST:
        total = count = 0.0
        for x in states:
            with torch.no_grad():
                log_p = (decoder.logits(source.spec, outer, x[:, scored.bool()]) / temperature).log_softmax(-1)
            total -= float((log_p.exp() * log_p).sum())
            count += log_p[..., 0].numel()
        if total >= unsure * count:
            break
        temperature *= 2
    return temperature


def _sampled_gradient(
    source: Source,
    outer: dict[str, Tensor],
    x: Tensor,
    scored: Tensor,
    generator: torch.Generator,
    temperature: float,
) -> Tensor:
    """d(−log p(y)) / dx with y drawn from p: its second moment is the Fisher information."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        log_probs = (decoder.logits(source.spec, outer, leaf) / temperature).log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().flatten(0, 1).exp().cpu(), 1, generator=generator)
        loss = -log_probs.flatten(0, 1).gather(1, drawn.to(x.device))
        loss = (loss.view(x.shape[:2]) * scored.to(x)).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def heed(power: Float[Tensor, "*position"]) -> Float[Tensor, "*position"]:
    """How much an error counts at each position: 1 / (r² + median r²), mean 1; `power`: r², a state's mean square.

    Whatever reads a state divides it by its size. In trained models single tokens are hundreds of times as large as the
    rest (massive activations: Sun et al. 2024); unweighted, they would be all that is kept and fitted.
    """
    weight = 1 / (power + power.median()).clamp_min(1e-12)
    return weight / weight.mean()


def _felt(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at the states x, none where a state is empty: any error is larger than it, and first order no guide.

    A padding token's embedding stays zero in training; where it begins a row so does the stream, and the gradient grows
    by 1 / √ε at every RMSNorm on the way down, until one such row is all of the Fisher matrix.
    """
    power = x.pow(2).mean(-1, keepdim=True)
    return torch.where(power > NOTHING * power.median(), gradient, 0)


def _accumulate(present: Tensor, heard: Tensor, x: Tensor, g: Tensor) -> None:
    """Add s sᵀ and g gᵀ over positions, states relative to their size and gradients to its inverse."""
    root = heed(x.pow(2).mean(-1, keepdim=True)).sqrt()
    for total, one in ((present, x * root), (heard, g / root)):
        flat = one.flatten(0, -2)
        total.add_((flat.T @ flat).double())


def _normalised(moments: Tensor) -> Tensor:
    """Sum over boundaries, each brought to unit mean power, so that no depth outweighs the others."""
    power = moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    return (moments / power[:, None, None]).sum(0)


def _balance(present: Tensor, heard: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, R, L⁻ᵀ U and the scores."""
    eye = torch.eye(len(present), dtype=present.dtype, device=present.device)
    factor = torch.linalg.cholesky(present + 1e-4 * present.diagonal().mean() * eye)
    power, rotation = torch.linalg.eigh(factor.T @ heard @ factor)
    power, rotation = power.flip(0).clamp_min(0), rotation.flip(1)
    directions, triangle = torch.linalg.qr(factor @ rotation)
    functionals = torch.linalg.solve_triangular(factor.T, rotation, upper=True)
    return directions, triangle, functionals, power / power.sum()


def has_constant(experts: Sequence[Spec], width: int) -> bool:
    """Whether a stream of that width keeps one dimension constant.

    For the experts' constants; and where not all of the experts' streams fits, since every regression can use one and
    the size by which readers divide is steadier.
    """
    return any(s.has_constants for s in experts) or width < sum(s.width for s in experts)


def allot(bases: Sequence[Basis], width: int, balance: Sequence[float] | None = None, even: float = 0.0) -> list[int]:
    """Share `width` dimensions out to the experts, best score first; none goes without, none gets more than it has.

    `balance` multiplies the scores of each expert. `even`, from 0 to 1, is the part of the width that is dealt out in
    proportion to the experts' own widths first: scores of experts that are always sure of themselves do not compare.
    """
    share = balance if balance is not None else [1.0] * len(bases)
    total = sum(len(basis.scores) for basis in bases)
    sure = [max(1, int(even * width * len(basis.scores) / total)) for basis in bases]
    scored = sorted(
        ((-float(score) * share[k], k, i) for k, basis in enumerate(bases) for i, score in enumerate(basis.scores))
    )
    scored.sort(key=lambda entry: entry[2] >= sure[entry[1]])
    taken = [k for _, k, _ in scored[:width]]
    return [taken.count(k) for k in range(len(bases))]


def encoders(
    bases: Sequence[Basis],
    scales: Sequence[float],
    balance: Sequence[float],
    total: int,
    dtype: torch.dtype,
    first: int = 0,
    even: float = 0.0,
) -> tuple[list[Tensor], list[slice]]:
    """P_k (resid_k, total) and each expert's slice, from dimension `first` on.

    An RMSNorm hears no difference between a stream and a multiple of it, so each is brought to the size of the loudest,
    of which it has `scales` now: else what leaks from that one into the others' texts would drown theirs.
    """
    matrices, slices, start = [], [], first
    for basis, scale, n in zip(bases, scales, allot(bases, total - first, balance, even), strict=True):
        matrix = torch.zeros(len(basis.directions), total, dtype=dtype)
        matrix[:, start : start + n] = (basis.encoder(n) / scale).cpu()
        matrices.append(matrix)
        slices.append(slice(start, start + n))
        start += n
    return matrices, slices
