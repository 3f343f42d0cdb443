"""One model's next-token distributions told in another's tokens.

A *reading* is what a donor makes of rows of the result's tokens: the bytes behind a row are cut by the donor's own
tokenizer, and every anchor position is paired with the donor's last token that ends there (*exact*) or before, so that
nothing is looked up ahead. What the donor predicts at an anchor position becomes a distribution over the anchor's
tokens (`Translator.project`), where u is the donor's next token, v the anchor's:

- exact:    q(v) = Σ_u p(u) M(v | u); M counts what v follows where u does, on calibration rows, and backs off to the
            anchor's first piece of u;
- inside a donor's token (its bytes so far: r): q(v) = Σ_u p(u | u begins with r) [v is the anchor's first piece of the
            rest of u]. Conditioning on what is already read makes the step's probabilities multiply to those of the
            whole token (Phan et al. 2024; Vieira et al. 2024, with one cover instead of all);
- where the anchor's actual next token ends at a donor's token end as well, both have written the same bytes: its
            probability is replaced by the donor's for exactly these bytes, Π p(u_i), and the rest scaled to sum to one.

With a guess s(v), a student's own predictions, the counts are left out:

    q(v) = s(v) Σ_u p(u) [v fits u] / Σ_w s(w) [w fits u]

is the distribution nearest to s (in KL) that gives the tokens which begin as u does the donor's probability of u.

A little of the anchor's unigram distribution (`FLOOR`) keeps every logarithm finite.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymerge.align.pieces import cut
from polymerge.align.spans import encode
from polymerge.align.token_bytes import ByteView
from polymerge.align.vocab import VocabMap, shared, vocab_map

FLOOR = 1e-3
REMEMBERED = 4096
"""Beginnings of tokens whose continuations are kept."""
LEAST, MOST = 1e-30, 1 - 1e-6
ALONE = 1e-6
"""Probability below which what shares a donor's token with the actual one is nothing."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A donor's tokens of the anchor's rows, and how the two are paired.

    `tokens` (row, time'), padded on the right; `last` (row, time): index of the donor token that is paired with each
    anchor position, -1 for none; `exact` (row, time): it ends at the same byte; `pending`: for each row, (position,
    bytes read since the donor's last token ended) of the positions that are not exact.
    """

    tokens: Int[Tensor, "row donor_time"]
    lengths: Int[Tensor, " row"]
    last: Int[Tensor, "row time"]
    exact: Bool[Tensor, "row time"]
    pending: tuple[tuple[tuple[int, bytes], ...], ...]

    def of(self, rows: Tensor) -> "Reading":
        """Some of the rows."""
        pending = tuple(self.pending[i] for i in rows.tolist())
        return Reading(self.tokens[rows], self.lengths[rows], self.last[rows], self.exact[rows], pending)

    def paired(self, x: Float[Tensor, "row donor_time dim"], time: int) -> Float[Tensor, "row time dim"]:
        """The donor's values at the first `time` anchor positions (the first value where there is none)."""
        index = self.last[:, :time, None].clamp_min(0).to(x.device)
        return x.gather(1, index.expand(-1, -1, x.shape[-1]))


class Translator:
    """From a donor's tokens to the anchor's. `lead`: the donor begins every text with its bos token."""

    def __init__(self, anchor: ByteView, donor: ByteView, vocab: int, *, lead: bool = False) -> None:
        self.anchor, self.donor, self.vocab = anchor, donor, vocab
        self.lead = donor.roles["bos"] if lead else None
        ids, targets = shared(anchor, donor)
        self.special = {i: j for i, j in zip(ids.tolist(), targets.tolist(), strict=True) if anchor.special[i]}
        self.first = vocab_map(donor, anchor, method="first")
        self.begun = self._begun()
        self.prior = torch.full((vocab,), 1 / vocab)
        self.map = self._mixed(torch.zeros(0, 2, dtype=torch.int64))
        self._sorted = sorted((s, i) for i, s in enumerate(donor.surface) if s and not donor.special[i])
        self._keys = [s for s, _ in self._sorted]
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}

    # ------------------------------------------------------------------ reading

    def read(self, tokens: Int[Tensor, "row time"], limit: int | None = None) -> Reading:
        """The donor's reading of rows of anchor tokens; of a row it reads at most `limit` tokens of its own.

        What comes after them is paired with nothing.
        """
        rows = [_cut_off(self._row(ids), limit) for ids in tokens.tolist()]
        lengths = torch.tensor([len(ids) for ids, *_ in rows])
        donor = torch.zeros(len(rows), max(1, int(lengths.max())), dtype=torch.int64)
        for out, (ids, *_) in zip(donor, rows, strict=True):
            out[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        last = torch.tensor([found for _, found, _, _ in rows])
        exact = torch.tensor([found for _, _, found, _ in rows])
        return Reading(donor, lengths, last, exact, tuple(tuple(found) for *_, found in rows))

    def fit(self, tokens: Int[Tensor, "row time"]) -> None:
        """Learn from calibration rows: the anchor's unigram distribution, and what follows where."""
        reading = self.read(tokens)
        counts = torch.bincount(tokens.flatten(), minlength=self.vocab)[: self.vocab].double() + 1
        self.prior = (counts / counts.sum()).float()
        following = reading.last[:, :-1] + 1
        valid = reading.exact[:, :-1] & (following > 0) & (following < reading.lengths[:, None])
        donor = reading.tokens.gather(1, following.clamp(0, reading.tokens.shape[1] - 1))
        self.map = self._mixed(torch.stack([donor[valid], tokens[:, 1:][valid]], dim=1))

    def _row(self, ids: list[int]) -> tuple[list[int], list[int], list[bool], list[tuple[int, bytes]]]:
        """Donor ids; for each anchor token: the paired index, whether exact; what is pending where not."""
        data = bytearray()
        ends: list[int] = []
        donor, stops = ([], []) if self.lead is None else ([self.lead], [0])
        start = 0

        def close() -> None:
            for token, stop in self._cut(bytes(data[start:])):
                donor.append(token)
                stops.append(start + stop)

        for i in ids:
            if not self.anchor.special[i]:
                data += self.anchor.surface[i]
            else:  # stands for one byte, so that the texts on its two sides keep apart
                close()
                data += b"\0"
                start = len(data)
                begun = self.lead is not None and len(ends) == 0
                if i in self.special and not begun:
                    donor.append(self.special[i])
                    stops.append(start)
                elif stops:
                    stops[-1] = start
            ends.append(len(data))
        close()
        last, exact, pending, at = [], [], [], -1
        for t, end in enumerate(ends):
            while at + 1 < len(stops) and stops[at + 1] <= end:
                at += 1
            last.append(at)
            exact.append(at >= 0 and stops[at] == end)
            if not exact[-1]:
                pending.append((t, bytes(data[stops[at] if at >= 0 else 0 : end])))
        return donor, last, exact, pending

    def _cut(self, data: bytes) -> list[tuple[int, int]]:
        """(donor token, where it ends) of a piece of text; a character that is cut at either side is left out."""
        first = 0
        while first < min(3, len(data)) and data[first] & 0xC0 == 0x80:  # noqa: PLR2004  continuation bytes
            first += 1
        text = data[first:].decode(errors="ignore")
        ids, boundaries = encode(self.donor, text)
        return [(i, first + b) for i, b in zip(ids.tolist(), boundaries[1:].tolist(), strict=True)]

    # ------------------------------------------------------------------ projection

    def project(
        self,
        log_probs: Float[Tensor, "row donor_time donor"],
        reading: Reading,
        tokens: Int[Tensor, "row time"],
        guess: Float[Tensor, "row time vocab"] | None = None,
        *,
        seen: bool = True,
    ) -> Float[Tensor, "row time vocab"]:
        """Log q(next anchor token) at every anchor position; proper distributions.

        `guess`: probabilities that share out what a donor's token leaves open, instead of the counts M. `seen`: the
        actual next token has the donor's own probability.
        """
        device = log_probs.device
        p = log_probs[..., : len(self.donor.pieces)].float().exp()
        at = reading.paired(p, tokens.shape[1])
        with torch.autocast(device.type, enabled=False):  # probabilities need float32
            flat = at.flatten(0, 1).T
            if guess is None:
                q = (self.map.to(device) @ flat).T.reshape(*tokens.shape, self.vocab)
            else:
                fits, share = self.fits.to(device), guess.float().flatten(0, 1).T
                q = share * (fits @ (flat / (fits.T @ share).clamp_min(LEAST)))
                q = q.T.reshape(*tokens.shape, self.vocab)
        prior = self.prior.to(device)
        q[reading.last.to(device) < 0] = prior
        ahead = torch.zeros(tokens.shape, device=device)
        for row, waiting in enumerate(reading.pending):
            for t, read in waiting:
                if reading.last[row, t] >= 0:
                    q[row, t] = self._inside(at[row, t], read)
                    ahead[row, t] = q[row, t].sum()
        ahead = torch.where(ahead > 0, ahead, 1.0).log()
        total = q.sum(-1, keepdim=True)
        q = torch.where(total > LEAST, q / total.clamp_min(LEAST), prior)
        q = (1 - FLOOR) * q + FLOOR * prior
        if not seen:
            return q.log()
        return (
            self._replaced(q, log_probs, ahead, reading, tokens.to(device), within=guess is not None)
            .clamp_min(LEAST)
            .log()
        )

    def _inside(self, p: Float[Tensor, " donor"], read: bytes) -> Float[Tensor, " vocab"]:
        donor, anchor = self._continued(read)
        return torch.zeros(self.vocab, device=p.device).index_add_(0, anchor.to(p.device), p[donor.to(p.device)])

    def _continued(self, read: bytes) -> tuple[Tensor, Tensor]:
        """Donor tokens that begin with the bytes read and go on, and the anchor's first piece of what then comes."""
        if read not in self._known:
            found = []
            for surface, i in self._sorted[bisect_left(self._keys, read) :]:
                if not surface.startswith(read):
                    break
                if len(surface) > len(read):
                    found.append((i, surface[len(read) :]))
            pieces = cut(self.anchor, (rest for _, rest in found))
            pairs = [(i, piece[0]) for (i, _), piece in zip(found, pieces, strict=True) if piece]
            table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[read] = (table[:, 0], table[:, 1])
        return self._known[read]

    def _replaced(
        self, q: Tensor, log_probs: Tensor, ahead: Tensor, reading: Reading, tokens: Tensor, *, within: bool
    ) -> Tensor:
        """The actual next token's probability becomes the donor's for the same bytes.

        `ahead` (row, time): log-probability that the donor's next token begins with the bytes that are pending. With
        the tokens before it that is log p(all bytes so far), so a step's is the difference.
        """
        device = q.device
        following = reading.tokens[:, 1:, None].to(device)
        spent = log_probs[:, :-1].gather(-1, following)[..., 0].double().cumsum(1)
        spent = torch.cat([spent.new_zeros(len(spent), 1), spent], dim=1)  # log p of the tokens up to each
        last, exact = reading.last.to(device), reading.exact.to(device)
        read = spent.gather(1, last.clamp_min(0)) + ahead
        moved = (last[:, 1:] > last[:, :-1]) | ~exact[:, 1:] | ~exact[:, :-1]  # not so: a token without counterpart
        known = (last[:, :-1] >= 0) & (last[:, 1:] >= 0) & moved
        chunk = (read[:, 1:] - read[:, :-1]).exp().clamp(LEAST, MOST).to(q.dtype)
        place = tokens[:, 1:, None]
        before = q[:, :-1].gather(-1, place)[..., 0]
        chunk = torch.where(known, chunk, before)
        out = q.clone()
        if within:
            out[:, :-1] *= self._scales(q, chunk, before, reading, tokens)
        else:
            out[:, :-1] *= ((1 - chunk) / (1 - before).clamp_min(LEAST))[..., None]
        out[:, :-1] = out[:, :-1].scatter(-1, place, chunk[..., None])
        return out

    def _scales(self, q: Tensor, chunk: Tensor, before: Tensor, reading: Reading, tokens: Tensor) -> Tensor:
        """Factors (row, time - 1, vocab) of the other tokens once the actual one has the probability `chunk`.

        Where it begins with the donor's next token, whose probability is known, the rest of that probability is for
        the other tokens that begin so, and the tokens that do not keep theirs.
        """
        device, begun = q.device, self.begun.to(q.device)
        index = (reading.last[:, :-1] + 1).clamp(0, reading.tokens.shape[1] - 1)
        after = reading.tokens.gather(1, index).to(device)
        begins = reading.exact[:, :-1].to(device) & (begun[tokens[:, 1:]] == after)
        alike = begins[..., None] & (begun == after[..., None])
        mass, others = (q[:, :-1] * alike).sum(-1), (q[:, :-1] * ~alike).sum(-1)  # 1 − mass loses what is small
        rest = (q[:, :-1] * alike).scatter(-1, tokens[:, 1:, None], 0.0).sum(-1)
        # The donor's token together; at least the actual one, which is all of it where no other token begins so.
        least = torch.where(rest > ALONE, torch.maximum(mass, chunk), chunk)
        inside = (least - chunk) / rest.clamp_min(ALONE)
        everywhere = (1 - chunk) / (1 - before).clamp_min(LEAST)
        outside = torch.where(begins, (1 - least) / others.clamp_min(ALONE), everywhere)
        return torch.where(alike, inside[..., None], outside[..., None])

    def _begun(self) -> Tensor:
        """The donor's first token (vocab,) of each anchor token's bytes, -1 for none."""
        first = vocab_map(self.anchor, self.donor, method="first")
        out = torch.full((self.vocab,), -1, dtype=torch.int64)
        out[first.rows] = first.columns
        return out

    @cached_property
    def fits(self) -> Tensor:
        """Which anchor tokens the donor's next token may mean (vocab, donor), sparse, of 0 and 1.

        Those that begin with it, and the anchor's first piece of it.
        """
        tokens = torch.nonzero(self.begun >= 0)[:, 0]
        anchor = torch.cat([tokens, self.first.columns])
        donor = torch.cat([self.begun[tokens], self.first.rows])
        place = torch.unique(torch.stack([anchor, donor]), dim=1)
        ones = torch.ones(place.shape[1])
        size = (self.vocab, len(self.donor.pieces))
        return torch.sparse_coo_tensor(place, ones, size, check_invariants=False).coalesce()

    def _mixed(self, seen: Int[Tensor, "pair 2"]) -> Tensor:
        """M (vocab, donor), sparse: counts of (donor token, anchor token) with one count of the first piece."""
        first: VocabMap = self.first
        donor = torch.cat([first.rows, seen[:, 0]])
        anchor = torch.cat([first.columns, seen[:, 1]])
        weight = torch.cat([first.weights.float(), torch.ones(len(seen))])
        size = len(self.donor.pieces)
        total = torch.zeros(size).index_add_(0, donor, weight)
        place = torch.stack([anchor, donor])
        matrix = torch.sparse_coo_tensor(place, weight / total[donor], (self.vocab, size), check_invariants=False)
        return matrix.coalesce()

    def embeddings(
        self, vectors: Float[Tensor, "donor dim"], reading: Reading, tokens: Int[Tensor, "row time"]
    ) -> Float[Tensor, "vocab dim"]:
        """An embedding in the donor's space for each anchor token.

        Least squares onto the donor's embedding of the token that is paired with it, with one count of the mean of
        its pieces.
        """
        composed = vocab_map(self.anchor, self.donor, method="mean").embed(vectors)
        sums = torch.zeros(self.vocab, vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        sums[: len(composed)] = composed
        counts = torch.ones(self.vocab, dtype=vectors.dtype, device=vectors.device)
        where = (reading.exact & (reading.last >= 0)).to(vectors.device)
        donor = reading.tokens.gather(1, reading.last.clamp_min(0)).to(vectors.device)[where]
        anchor = tokens.to(vectors.device)[where]
        sums.index_add_(0, anchor, vectors[donor])
        counts.index_add_(0, anchor, torch.ones_like(anchor, dtype=vectors.dtype))
        return sums / counts[:, None]


Row = tuple[list[int], list[int], list[bool], list[tuple[int, bytes]]]


def _cut_off(row: Row, limit: int | None) -> Row:
    """A row of which the donor reads no more than its positions allow."""
    ids, last, exact, pending = row
    if limit is None or len(ids) <= limit:
        return row
    kept = sum(at < limit for at in last)
    rest = len(last) - kept
    within = [(t, read) for t, read in pending if t < kept]
    return ids[:limit], last[:kept] + [-1] * rest, exact[:kept] + [False] * rest, within
