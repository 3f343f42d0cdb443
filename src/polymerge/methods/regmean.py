"""RegMean++ after orthogonal alignment: every linear map by regression on the merged model's own activations.

    W' = argmin Σ_k w_k ‖X_k W'ᵀ − X_k W_kᵀ‖²  =  (Σ_k w_k G_k)⁻¹ Σ_k w_k G_k W_kᵀ,   G_k = X_kᵀ X_k

RegMean (Jin et al., ICLR 2023), with X_k the *merged* model's activations on expert k's texts, layer by layer
(RegMean++: Nguyen et al. 2025). Both are for equal architectures; here the experts are first brought to the anchor's
coordinates by `orthogonal`, which makes this the nearest rival of the fold: one set of units is shared, where the fold
joins all and drops the cheapest. As in RegMean, off-diagonal entries of G_k are damped. An expert that lacks a layer is
the identity there: zero writers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polymerge.calibrate.calibration import Calibration
from polymerge.methods import orthogonal
from polymerge.methods._lift import as_rows, lift, rows_of_all, shares
from polymerge.methods._maps import Weights, average, used_rows
from polymerge.methods._merge import Emit, aligned, embedding, final
from polymerge.model import decoder
from polymerge.model.source import Source
from polymerge.model.spec import Spec


@dataclass(frozen=True)
class Method:
    """RegMean++ after `orthogonal`. `damping`: of G's off-diagonal entries; `ridge` λ relative to its mean diagonal."""

    GRID: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"damping": 0.5}, {"damping": 0.1})

    weights: tuple[float, ...] = ()
    damping: float = 0.9
    ridge: float = 1e-6
    rows: int = 256
    batch: int = 32

    def merge(
        self, experts: Sequence[Source], anchor: int, target: Spec, texts: Calibration, emit: Emit, seed: int
    ) -> None:
        """Emit the target's weights. Raises PreflightError where `orthogonal` cannot."""
        del seed
        weights = shares(self.weights, len(experts))
        lifted = lift(experts, target)
        alignment = orthogonal.align(lifted, anchor, target, rows_of_all(texts, self.rows))
        embed = embedding(lifted, alignment, weights)
        emit(None, {"embed.weight": embed})
        run = _Regression(self, weights, target, embed, texts)
        for host in range(target.layers):
            emit(host, run.layer(aligned(lifted, alignment, target, host)))
        outer = final(lifted, alignment, weights, target, embed)
        if not target.tied:
            heads = {k: e.outer()["head.weight"] @ s.read.to(embed)
                     for k, (e, s) in enumerate(zip(lifted, alignment.streams, strict=True))}  # fmt: skip
            normed = run.grams(lambda x: decoder.normalise(target, x, outer["norm.weight"]))
            outer["head.weight"] = run.solve(normed, heads)
        emit(None, outer)


class _Regression:
    """The merged model so far, on each expert's texts."""

    def __init__(
        self, method: Method, weights: Sequence[float], target: Spec, embed: Tensor, texts: Calibration
    ) -> None:
        self.method, self.weights, self.target, self.like = method, weights, target, embed
        each = max(1, as_rows(method.rows, texts.tokens) // len(weights))
        batch = as_rows(method.batch, texts.tokens)
        self.states = [
            [F.embedding(rows.to(embed.device), embed) for rows in texts.of(k)[:each].split(batch)]
            for k in range(len(weights))
        ]

    @torch.no_grad()
    def layer(self, parts: dict[int, Weights]) -> Weights:
        """One layer: readers of the attention, o, readers of the MLP, down, each on what comes out of those before."""
        target = self.target
        out = average([(self.weights[k], part) for k, part in parts.items()], target, self.like)
        if not parts:
            return out
        has = {k: used_rows(part, target) for k, part in parts.items()}

        def regress(roles: Sequence[str], features: Callable[[Tensor], Tensor]) -> None:
            grams = self.grams(features)
            for role in roles:
                name, goals = f"{role}.weight", {}
                for k, part in parts.items():
                    # An expert without a unit has no opinion about what the unit reads.
                    mine = has[k][role][:, None] if role in has[k] else 1.0
                    goals[k] = mine * part[name] + (1 - mine) * out[name]
                if role in ("o", "down"):
                    goals |= {k: torch.zeros_like(out[name]) for k in range(len(self.weights)) if k not in parts}
                out[name] = self.solve(grams, goals)

        def normed(x: Tensor) -> Tensor:
            return decoder.normalise(target, x)

        def mixed(x: Tensor) -> Tensor:
            return decoder.attend(target, *decoder.project_heads(target, out, normed(x)))

        def hidden(x: Tensor) -> Tensor:
            return decoder.feed_forward(target, out, normed(x))[2]

        for readers, writer, features in ((("q", "k", "v"), "o", mixed), (("gate", "up"), "down", hidden)):
            regress(readers, normed)
            regress([writer], features)
            self.states = [[x + decoder.linear(out, writer, features(x)) for x in states] for states in self.states]
        return out

    def grams(self, features: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Mean of x xᵀ (in, in) on every expert's texts, off-diagonal entries damped."""
        out = []
        for states in self.states:
            total, rows = torch.zeros((), dtype=torch.float64), 0
            for state in states:
                x = features(state).flatten(0, 1)
                total, rows = total.to(x.device) + (x.T @ x).double(), rows + len(x)
            gram = total / max(1, rows) * self.method.damping
            out.append(gram + gram.diagonal().diag() * (1 / self.method.damping - 1))
        return out

    def solve(self, grams: Sequence[Tensor], goals: dict[int, Tensor]) -> Tensor:
        """The regression over the experts that have a say; λ pulls towards their average."""
        total = sum(self.weights[k] for k in goals)
        if total == 0:
            return torch.zeros_like(next(iter(goals.values())))
        shares_ = {k: self.weights[k] / total for k in goals}
        gram = torch.stack([w * grams[k] for k, w in shares_.items()]).sum(0)
        ridge = self.method.ridge * gram.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        right = torch.stack([w * (grams[k] + ridge * eye) @ goals[k].T.double() for k, w in shares_.items()]).sum(0)
        solved: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(gram + ridge * eye))
        return solved.T.to(self.like).contiguous()
