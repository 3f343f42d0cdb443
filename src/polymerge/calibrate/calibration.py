"""The token rows that a fold sees: whose they are, who matters where, and which are held out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polymerge.align.translate import Reading, Translator
from polymerge.calibrate import ownership
from polymerge.calibrate.foreign import Foreign
from polymerge.calibrate.texts import Rows
from polymerge.errors import TextError
from polymerge.model.source import Source

JUDGED, MARGIN = 64, 0.01
"""Rows of a skill by which its owner is judged, and the share of the loss that makes a difference."""


@dataclass(frozen=True)
class Calibration:
    """Rows of every skill, in the order of the experts.

    `fit` marks the rows that regressions see; the others are held out, to choose knobs and to report. `owned` is
    ownership o_k(x, t) in [0, 1]; `scored` (time,) marks the positions whose prediction counts;
    `bytes_per_token` turns nats per token of a skill into bits per byte. `foreign`: for experts with another tokenizer,
    how they read the rows.
    """

    tokens: Int[Tensor, "row time"]
    owner: Int[Tensor, " row"]
    fit: Tensor
    owned: Float[Tensor, "expert row time"]
    scored: Tensor
    bytes_per_token: tuple[float, ...]
    foreign: tuple[tuple[Reading, Translator] | None, ...] = ()

    def subset(self, fitted: int, held_out: int) -> "Calibration":
        """The first rows of every expert: so many that are fitted, so many that are held out."""
        keep = torch.cat([
            torch.nonzero((self.owner == k) & (self.fit == fit)).flatten()[:share]
            for k in range(len(self.owned))
            for fit, share in ((True, fitted), (False, held_out))
        ]).sort().values  # fmt: skip
        return replace(
            self,
            tokens=self.tokens[keep],
            owner=self.owner[keep],
            fit=self.fit[keep],
            owned=self.owned[:, keep],
            foreign=tuple(f and (f[0].of(keep), f[1]) for f in self.foreign),
        )

    def reading(self, expert: int) -> tuple[Reading, Translator] | None:
        """How an expert with another tokenizer reads the rows; None for the anchor's tokenizer."""
        return self.foreign[expert] if self.foreign else None

    def own(self, expert: int, limit: int) -> tuple[Int[Tensor, "row time"], Tensor]:
        """The first fitted rows of an expert in its own tokens, all of one length; which positions are scored."""
        mine = torch.nonzero((self.owner == expert) & self.fit).flatten()[:limit]
        foreign = self.reading(expert)
        if foreign is None:
            return self.tokens[mine], self.scored
        reading = foreign[0].of(mine)
        # A row that it reads by few tokens is left out: all would be cut to that.
        time = max(2, int(reading.lengths.kthvalue(1 + len(mine) // 10).values))
        whole = reading.tokens[reading.lengths >= time, :time]
        return whole, torch.ones(time, dtype=torch.bool)

    def of(self, expert: int, *, fit: bool = True) -> Int[Tensor, "row time"]:
        """The rows of one expert."""
        return self.tokens[(self.owner == expert) & (self.fit == fit)]

    def digest(self) -> str:
        """sha256 of tokens, owners and split."""
        data = torch.cat([self.tokens, self.owner[:, None], self.fit[:, None].long()], dim=1)
        return hashlib.sha256(data.contiguous().numpy().tobytes()).hexdigest()


def best_experts(fitted: Sequence[Rows], experts: Sequence[Source | Foreign]) -> list[int]:
    """Which expert predicts each skill's calibration text best (by skill, in the experts' order).

    The skill's own expert keeps it unless another is better by `MARGIN` of the loss: two models of one skill make one
    that keeps the better one's, and an expert that is best at nothing has nothing to add.
    """
    owners = []
    for k, rows in enumerate(fitted):
        losses = [-float(e.log_probs(rows.tokens[:JUDGED]).double().mean()) for e in experts]
        best = min(range(len(experts)), key=losses.__getitem__)
        owners.append(best if losses[best] < (1 - MARGIN) * losses[k] else k)
    return owners


def gather(
    fitted: Sequence[Rows],
    held_out: Sequence[Rows],
    experts: Sequence[Source | Foreign],
    owners: Sequence[int] | None = None,
    *,
    gate: bool = False,
) -> Calibration:
    """Join the rows of every skill; ownership from labels, or from the union's gate (`gate`).

    `owners`: index of the expert that owns each skill; by default they come in the same order.
    """
    owners = list(range(len(fitted))) if owners is None else owners
    for name, rows in (("calibration", fitted), ("validation", held_out)):
        if any(len(r.tokens) == 0 for r in rows):
            raise TextError(f"{name} text: a skill has less than one row of tokens; add text or shorten the rows")
    parts = [
        (k, fit, r.tokens)
        for fit, rows in ((True, fitted), (False, held_out))
        for k, r in zip(owners, rows, strict=True)
    ]
    order = _interleaved([(k, fit, len(t)) for k, fit, t in parts])
    tokens = torch.cat([t for _, _, t in parts])[order]
    owner = torch.cat([torch.full((len(t),), k) for k, _, t in parts])[order]
    fit = torch.cat([torch.full((len(t),), fit) for _, fit, t in parts])[order]
    if gate:
        log_probs = torch.stack([e.log_probs(tokens) for e in experts])
        owned = ownership.by_gate(log_probs)
    else:
        owned = ownership.by_prefix(tokens, owner, len(experts))
    return Calibration(
        tokens=tokens,
        owner=owner,
        fit=fit,
        owned=owned.to(experts[0].dtype),
        scored=torch.ones(tokens.shape[1], dtype=torch.bool),
        bytes_per_token=tuple(_bytes_per_token(fitted, owners, k) for k in range(len(experts))),
        foreign=tuple((e.read(tokens), e.translator) if isinstance(e, Foreign) else None for e in experts),
    )


def _interleaved(parts: Sequence[tuple[int, bool, int]]) -> list[int]:
    """An order of the rows of (owner, fit, rows): skills with one owner in turn, so that its first are of all."""
    first: dict[tuple[int, bool], int] = {}
    places = [
        (first.setdefault((owner, fit), at), i / rows)
        for at, (owner, fit, rows) in enumerate(parts)
        for i in range(rows)
    ]
    return sorted(range(len(places)), key=places.__getitem__)


def _bytes_per_token(fitted: Sequence[Rows], owners: Sequence[int], expert: int) -> float:
    mine = [r for r, owner in zip(fitted, owners, strict=True) if owner == expert]
    return sum(r.bytes for r in mine) / max(1, sum(r.tokens[:, 1:].numel() for r in mine))
