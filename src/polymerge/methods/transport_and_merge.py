"""Transport and Merge: two levels of optimal transport, layers and units, then a convex combination of attention maps.

    W_i' = (1 − α) W_i^A + α Σ_j L √(P_ij^post P_ij^pre) · Q_ij^post W_j^B (Q_ij^pre)ᵀ       for q, k, v, o of layer i

(Cui et al. 2026, arXiv 2602.05495.) Q_ij (units of A, units of B) is the Sinkhorn plan on 1 − correlation of the
outputs (post) or inputs (pre) of a map in layers i and j; P (layers of A, layers of B) is the plan on its costs.
Everything else, MLP and embeddings included, stays the anchor's.

`rescale: false` is the released code: plans of mass 1, never rescaled, so that what it adds is about 1/n² of the
donor, and the merge is nearly (1 − α) A in the attention. `rescale: true` corrects it: post maps take means (rows
sum to 1), pre maps share out (columns sum to 1). The released code's optional sparsification of plans and its
fine-tuning afterwards are left out.

A donor may be of any family that shares the tokenizer, as only correlations of its linear maps are used; its rotary
pairs and heads are not respected by the transport. The anchor must be llama-like.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polymerge.align import transport
from polymerge.align.correlation import Correlation
from polymerge.calibrate.calibration import Calibration
from polymerge.errors import PreflightError
from polymerge.methods._lift import Changed, Lifted, as_rows, hold, plan_of, rows_of_all
from polymerge.methods._maps import Weights
from polymerge.methods._merge import Alignment, Emit, emit_average
from polymerge.methods._traces import INPUTS, activations
from polymerge.methods.linear import padded
from polymerge.model.source import Source
from polymerge.model.spec import Spec

MAPS = {role: INPUTS[role] for role in ("q", "k", "v", "o")}
"""Each transported map and its input."""
KINDS = tuple(dict.fromkeys((*MAPS, *MAPS.values())))


@dataclass(frozen=True)
class Method:
    """Transport and Merge. `alpha`: the donors' share; `epsilon`: of both Sinkhorns, 0 for exact plans."""

    GRID: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"rescale": True, "alpha": 0.1}, {"rescale": True, "alpha": 0.3})

    alpha: float = 0.01
    epsilon: float = 0.1
    rescale: bool = False
    rows: int = 64
    batch: int = 16

    def check(self, experts: Sequence[Source], anchor: int, target: Spec) -> Lifted:
        """The anchor in the target's layout. Raises PreflightError where it does not fit, or vocabularies differ."""
        lifted = Lifted(experts[anchor], target, absorb=False)
        hold(lifted, target)
        for expert in experts:
            if expert.spec.vocab != target.vocab:
                raise PreflightError(
                    f"{expert.path}: {expert.spec.vocab} tokens, the anchor {target.vocab}: units are correlated on the"
                    " same tokens; merge experts that share a tokenizer"
                )
        return lifted

    def merge(
        self, experts: Sequence[Source], anchor: int, target: Spec, texts: Calibration, emit: Emit, seed: int
    ) -> None:
        """Emit the target's weights. Raises PreflightError as `check` does."""
        del seed
        lifted = self.check(experts, anchor, target)
        donors = [e for k, e in enumerate(experts) if k != anchor]
        tokens = rows_of_all(texts, self.rows)
        batches = tokens.split(as_rows(self.batch, tokens))
        gifts = [self.received(lifted, donor, batches) for donor in donors]

        def mix(index: int | None, own: Weights) -> Weights:
            if index is None:
                return own
            for name in gifts[0][index] if gifts else ():
                mean = torch.stack([gift[index][name] for gift in gifts]).mean(0)
                own[name] = (1 - self.alpha) * own[name] + self.alpha * mean
            return own

        mixed = Changed(lifted, mix)
        emit_average([mixed], Alignment([padded(mixed, target)], [{}] * target.layers), [1.0], target, emit)

    @torch.no_grad()
    def received(self, anchor: Lifted, donor: Source, batches: Sequence[Tensor]) -> list[Weights]:
        """What every layer of the anchor gets from a donor: q, k, v, o weights, and biases where both have them."""
        plans, couplings = self.couplings(anchor, donor, batches)
        layers = anchor.spec.layers
        out: list[Weights] = []
        for i in range(layers):
            own, got = anchor.layer(i), {}
            for role, feed in MAPS.items():
                total, bias = torch.zeros_like(own[f"{role}.weight"]), own.get(f"{role}.bias")
                shift = None if bias is None else torch.zeros_like(bias)
                for j in range(donor.spec.layers):
                    theirs = donor.layer(j)
                    share = layers * float((couplings[role][i, j] * couplings[feed][i, j]).sqrt())
                    post, pre = plans[role, i, j].to(total), plans[feed, i, j].to(total)
                    if self.rescale:
                        post, pre = transport.mean_map(post), transport.share_map(pre)
                    total += share * (post.T @ theirs[f"{role}.weight"] @ pre)
                    if shift is not None and f"{role}.bias" in theirs:
                        shift += share * (theirs[f"{role}.bias"] @ post)
                got[f"{role}.weight"] = total
                if shift is not None:
                    got[f"{role}.bias"] = shift
            out.append(got)
        return out

    def couplings(
        self, anchor: Lifted, donor: Source, batches: Sequence[Tensor]
    ) -> tuple[dict[tuple[str, int, int], Tensor], dict[str, Tensor]]:
        """Plans (units of B, units of A) by kind and layers, and the coupling of layers (layers of A, of B) by kind."""
        moments: dict[tuple[str, int, int], Correlation] = {}
        for tokens in (rows.to(donor.device) for rows in batches):
            ours, theirs = (list(activations(e.spec, e.outer(), e.layer, tokens))[1:-1] for e in (anchor, donor))
            for i, own in enumerate(ours):
                for j, other in enumerate(theirs):
                    for kind in KINDS:
                        x, y = own[kind], other[kind]
                        if (kind, i, j) not in moments:
                            moments[kind, i, j] = Correlation(y.shape[-1], x.shape[-1], x.device)
                        moments[kind, i, j].add(y, x)
        plans, layers = {}, {}
        for kind in KINDS:
            costs = torch.zeros(anchor.spec.layers, donor.spec.layers, dtype=torch.float64)
            for i, j in torch.cartesian_prod(*(torch.arange(n) for n in costs.shape)).view(-1, 2).tolist():
                cost = 1 - moments[kind, i, j].matrix()
                plans[kind, i, j] = plan_of(cost, self.epsilon)
                costs[i, j] = float((cost * plans[kind, i, j]).sum())
            layers[kind] = plan_of(costs, self.epsilon)
        return plans, layers
