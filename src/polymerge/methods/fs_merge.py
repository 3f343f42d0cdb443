"""FS-Merge: a super-network of frozen experts, whose merge and unmerge maps are learned and then folded into one model.

    W* = Σ_k M_kᵀ W_k U_kᵀ,      M_k, U_k = (alignment of `orthogonal`) · (diagonal + A B, rank r)

"Foldable SuperNets" (Kinderman et al., TMLR 2025): the experts' weights stay as they are; Adam trains the maps on both
sides of each, so that what the experts compute can be read off the merged features on their own texts:

    min  Σ_k w_k Σ_b ‖n(V_kb x_b) − n(x_kb)‖² / n   +   ‖z − z_k‖² / ‖z_k‖²

x_b and x_kb are the residual streams of result and expert k at block boundary b, n the bare RMSNorm (their scale is
free), V_kb an unmerge map of the same kind, z centred logits. The paper has a head for each task and matches features
only; one head for all makes logits the last feature. All layers are trained at once.

Works on the anchor's units, as `orthogonal` does, where training starts; `steps: 0` is that. Norms are the average's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polymerge.calibrate.calibration import Calibration
from polymerge.methods import orthogonal
from polymerge.methods._lift import Lifted, lift, rows_of_all, shares
from polymerge.methods._maps import Weights, average, row_shares
from polymerge.methods._merge import Alignment, Emit, aligned, embedding, final
from polymerge.model import decoder
from polymerge.model.source import Source
from polymerge.model.spec import Spec

MAPS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Method:
    """Foldable super-network. `rank` of the learned maps; Adam for `steps` of `tokens` at `lr`, decaying to zero."""

    GRID: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"lr": 6e-3}, {"lr": 6e-3, "steps": 800})

    weights: tuple[float, ...] = ()
    rank: int = 16
    steps: int = 200
    lr: float = 2e-3
    tokens: int = 1024
    rows: int = 256

    @property
    def training_tokens(self) -> int:
        """Tokens that training reads."""
        return self.steps * self.tokens

    def merge(
        self, experts: Sequence[Source], anchor: int, target: Spec, texts: Calibration, emit: Emit, seed: int
    ) -> None:
        """Emit the target's weights. Raises PreflightError where `orthogonal` cannot."""
        weights = shares(self.weights, len(experts))
        lifted = lift(experts, target)
        alignment = orthogonal.align(lifted, anchor, target, rows_of_all(texts, self.rows))
        net = _SuperNet(lifted, alignment, weights, target, self.rank, torch.Generator().manual_seed(seed))
        with torch.enable_grad():
            net.train(texts, self, seed)
        with torch.no_grad():
            folded = net.folded()
        for layer, part in folded.items():
            emit(layer, part)


class _Map:
    """A learned square map on the last axis: x ↦ x ∘ d + (x A) B, at first x ∘ d."""

    def __init__(self, diagonal: Float[Tensor, " n"], rank: int, generator: torch.Generator) -> None:
        n = len(diagonal)
        a = torch.randn(n, rank, generator=generator, dtype=diagonal.dtype) / n**0.5
        self.diagonal = diagonal.detach().clone().requires_grad_()
        self.a = a.to(diagonal.device).requires_grad_()
        self.b = diagonal.new_zeros(rank, n).requires_grad_()

    def __call__(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        mapped: Tensor = x * self.diagonal + (x @ self.a) @ self.b
        return mapped


class _SuperNet:
    """Aligned experts and the maps on both sides of each of their weights; `folded` is the merged model."""

    def __init__(
        self,
        lifted: Sequence[Lifted],
        alignment: Alignment,
        weights: Sequence[float],
        target: Spec,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        self.lifted, self.weights, self.target = lifted, weights, target
        self.maps: list[_Map] = []
        self.layers: list[tuple[Weights, list[tuple[Weights, dict[str, tuple[_Map, _Map]]]]]] = []

        def learned(diagonal: Tensor) -> _Map:
            self.maps.append(_Map(diagonal, rank, generator))
            return self.maps[-1]

        embed = embedding(lifted, alignment, weights)
        self.norm = final(lifted, alignment, weights, target, embed)["norm.weight"]
        ones = torch.ones_like(embed[0])
        self.outer = []
        for w, expert, stream in zip(weights, lifted, alignment.streams, strict=True):
            outer = expert.outer()
            tables = [outer["embed.weight"] @ stream.write.to(embed), outer["head.weight"] @ stream.read.to(embed)]
            self.outer.append([(table, learned(w * ones)) for table in tables])
        for host in range(target.layers):
            parts = aligned(lifted, alignment, target, host)
            start = average([(weights[k], part) for k, part in parts.items()], target, embed)
            say = row_shares([(weights[k], part) for k, part in parts.items()], target)
            self.layers.append((start, [
                (part, {role: (learned(share[role]), learned(torch.ones_like(part[f"{role}.weight"][0])))
                        for role in MAPS})
                for part, share in zip(parts.values(), say, strict=True)
            ]))  # fmt: skip
        reads = [stream.read.T.to(embed) for stream in alignment.streams]
        self.unmerge = [[(learned(ones), read) for _ in range(target.layers + 1)] for read in reads]

    def folded(self) -> dict[int | None, Weights]:
        """The merged model's weights: Σ_k M_kᵀ W_k U_kᵀ for every map, its bias by M_k alone."""
        (embeds, heads) = zip(*self.outer, strict=True)
        embed, head = (sum((m(x) for x, m in some), torch.zeros_like(some[0][0])) for some in (embeds, heads))
        out: dict[int | None, Weights] = {None: {"embed.weight": embed, "norm.weight": self.norm}}
        out[None]["head.weight"] = embed if self.target.tied else head
        for index, (start, experts) in enumerate(self.layers):
            layer = dict(start)
            for name in start:
                role, kind = name.split(".")
                if role in MAPS and experts:
                    parts = [
                        maps[role][0](maps[role][1](w[name]).T).T if kind == "weight" else maps[role][0](w[name])
                        for w, maps in experts
                    ]
                    layer[name] = torch.stack(parts).sum(0)
            out[index] = layer
        return out

    def train(self, texts: Calibration, settings: Method, seed: int) -> None:
        """Adam on all maps, a batch of every expert's rows at each step."""
        flat = [p for m in self.maps for p in (m.diagonal, m.a, m.b)]
        optimiser = torch.optim.Adam(flat, lr=settings.lr, eps=1e-6)
        generator = torch.Generator().manual_seed(seed)
        rows = {k: texts.of(k) for k in range(len(self.lifted)) if self.weights[k] > 0 and len(texts.of(k))}
        each = max(1, settings.tokens // (texts.tokens.shape[1] * max(1, len(rows))))
        scored = texts.scored.to(self.norm.device)
        for step in range(settings.steps):
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * min((step + 1) / 10, 1 - step / settings.steps)
            model = self.folded()
            losses = [
                self.weights[k] * self.loss(model, k, of[torch.randint(len(of), (each,), generator=generator)], scored)
                for k, of in rows.items()
            ]
            optimiser.zero_grad()
            torch.stack(losses).sum().backward()
            optimiser.step()

    def loss(self, model: Mapping[int | None, Weights], k: int, rows: Tensor, scored: Tensor) -> Tensor:
        """How far the merged features are from expert k's on these rows."""
        rows = rows.to(self.norm.device)
        with torch.no_grad():
            goals = list(features(self.lifted[k], rows))
        x = decoder.embed(self.target, model[None], rows)
        states = [x]
        for index in range(self.target.layers):
            states.append(decoder.layer(self.target, model[index], states[-1]).out)
        total = x.new_zeros(())
        for state, goal, (unmerge, read) in zip(states, goals[:-1], self.unmerge[k], strict=True):
            found = decoder.normalise(self.target, unmerge(state) @ read)
            total = total + (found - decoder.normalise(self.target, goal)).pow(2).mean()
        logits, goal = (
            z - z.mean(-1, keepdim=True)
            for z in (decoder.logits(self.target, model[None], states[-1][:, scored]), goals[-1][:, scored])
        )
        return total / len(states) + (logits - goal).pow(2).sum() / goal.pow(2).sum().clamp_min(1e-30)


def features(expert: Lifted, rows: Tensor) -> Iterator[Tensor]:
    """An expert's residual stream at every block boundary of the target, then its logits."""
    outer = expert.outer()
    x = decoder.embed(expert.spec, outer, rows)
    yield x
    for host in range(expert.target.layers):
        weights = expert.at(host)
        if weights is not None:
            x = decoder.layer(expert.spec, weights, x).out
        yield x
    yield decoder.logits(expert.spec, outer, x)
