"""Experts of a union whose tokenizer is not the anchor's: donors, which read bytes and predict the anchor's tokens.

A donor reads the row's bytes s as a beam of heads, which is exact up to what the beam drops (Phan et al. 2024;
Vieira et al. 2024; `tests/byte_lm.py` is the reference). A head is a sequence of the donor's tokens that
spells s but for the bytes pending at its end, and the next token w must begin with those and go on:

    mass of (head, w) = P(head's tokens) p(w | head's tokens)

So " the" read so far may go on as " there". The masses are normalised, and what w holds beyond s, the remainder
r, says which anchor tokens fit: the first token of the anchor's cut of r, and those longer than r that the donor
would begin with this very w. A mass is shared among those that fit as the experts with the anchor's tokenizer
predict them: a donor with shorter tokens says how the anchor's token begins, the anchor how it goes on. The
result is a distribution over the anchor's tokens that depends on nothing but what was read. `FLOOR` of it is the
anchor's own prediction, so that nothing is impossible.

Where a donor cannot speak (nothing read and no token to begin with, a longer text than its positions hold) its
prediction is the anchor's.

Boundary cost, measured on small models (bits per byte of a donor's prediction less those of its own tokens): at
most 0.05 where the anchor's tokens are bytes, 0.2 to 0.4 for BPE of 4k tokens under an anchor of 1k, 0.1 to 0.7 for
donors whose tokens are shorter than the anchor's. So the anchor should be the expert with the shortest tokens.

This file travels with union checkpoints. Shapes: V the anchor's vocabulary, D a donor's. Log-probabilities are in nats.
"""

import bisect
import copy
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

FLOOR = 1e-3  # share of a donor's prediction that is the anchor's
EVEN = 1e-3  # share of the anchor's prediction that is even where it shares out a donor's mass
LIGHT = 1e-4  # heads with less than this share of the heaviest one's mass are dropped
HEADS = 8  # heads kept
REMEMBERED = 4096  # remainders whose fitting tokens are kept
# What models call a KV cache: transformers 5.24 renamed it.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Vocabulary:
    """A tokenizer and the bytes of its tokens, read from the table that the checkpoint holds.

    `tokens`: bytes by id, None for special tokens. `order`: ids with bytes, in byte order. `lead`: ids that come
    before a text. `dummy`: whether it puts a space in front of a text.
    """

    def __init__(self, table: bytes) -> None:
        facts = json.loads(zlib.decompress(table))
        self.backend = Tokenizer.from_str(facts["backend"])
        self.tokens = [None if t is None else t.encode("latin-1") for t in facts["tokens"]]
        self.kind, self.space = str(facts["kind"]), str(facts["space"])
        self.lead: list[int] = list(facts["lead"])
        self.roles: dict[str, int] = dict(facts["roles"])
        self.literals: dict[str, int] = dict(facts["literals"])
        self.alphabet: list[str] = list(facts["alphabet"])
        pairs = sorted((t, i) for i, t in enumerate(self.tokens) if t)
        self.texts, self.order = [t for t, _ in pairs], [i for _, i in pairs]
        self.longest = max(map(len, self.texts), default=0)
        self.single = {t[0]: i for t, i in reversed(pairs) if len(t) == 1}
        self.dummy = self._spelt(self._ids("a")) == b" a"

    def range(self, start: bytes) -> tuple[int, int]:
        """Places in `order` of the tokens that begin with these bytes and are longer."""
        low = bisect.bisect_right(self.texts, start)
        stripped = start.rstrip(b"\xff")
        if not stripped:
            return low, len(self.texts)
        return low, bisect.bisect_left(self.texts, stripped[:-1] + bytes([stripped[-1] + 1]))

    def encode(self, data: bytes) -> list[int]:
        """Token ids of a text. Bytes that are not UTF-8 become single-byte tokens."""
        ids: list[int] = []
        while data:
            try:
                text, bad, data = data.decode(), b"", b""
            except UnicodeDecodeError as error:
                text, bad, data = data[: error.start].decode(), data[error.start : error.end], data[error.end :]
            ids += [*(self._ids(text) if text else []), *(self.single[b] for b in bad if b in self.single)]
        return ids

    def first(self, data: bytes) -> int | None:
        r"""The first token of these bytes as the tokenizer's model cuts them in the middle of a text.

        The model alone: rules that split a text look at what follows ("\n   " is cut otherwise at the end of a
        text than before a word), and nothing is known to follow here.
        """
        if self.kind == "byte-level":
            written = "".join(self.alphabet[b] for b in data)
        else:
            written = data.decode(errors="ignore").replace(" ", self.space)
            if not written or not data.startswith(written[0].replace(self.space, " ").encode()):
                return self.single.get(data[0])
        return self._known([t.id for t in self.backend.model.tokenize(written)])

    def _known(self, ids: Sequence[int]) -> int | None:
        return ids[0] if ids and self.tokens[ids[0]] else None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _spelt(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[i] or b"" for i in ids)


class Projection:
    """From a donor's tokens to the anchor's; built once per model."""

    def __init__(self, anchor: Vocabulary, donor: Vocabulary, size: int) -> None:
        self.anchor, self.donor, self.size = anchor, donor, size
        self.donor_order = torch.tensor(donor.order, dtype=torch.int64)
        self.even = torch.zeros(size, dtype=torch.float64)
        self.even[torch.tensor(anchor.order, dtype=torch.int64)] = 1 / max(len(anchor.order), 1)
        self.special = self._specials()
        self.known: dict[bytes, tuple[Tensor, Tensor, Tensor]] = {}

    def fits(self, pending: bytes) -> tuple[Tensor, Tensor, Tensor]:
        """Which anchor tokens fit which donor tokens, when the donor's next one covers the pending bytes.

        Returns ids (n,) of donor tokens that begin with the pending bytes and are longer (special ones if none
        pends), and pairs: place in `ids`, anchor token.
        """
        found = self.known.get(pending)
        if found is None:
            low, high = self.donor.range(pending)
            ids = self.donor.order[low:high]
            pairs: list[tuple[int, int]] = []
            for place, donor in enumerate(ids):
                rest = self.donor.texts[low + place][len(pending) :]
                first = self.anchor.first(rest)
                if first is not None:
                    pairs.append((place, first))
                # A longer token fits where the donor would begin it with this very token and no other.
                begin, end = self.anchor.range(rest)
                pairs += [
                    (place, self.anchor.order[i])
                    for i in range(begin, end)
                    if self.donor.first(pending + self.anchor.texts[i]) == donor
                ]
            if not pending:
                for anchor, donor in self.special.items():
                    pairs.append((len(ids), anchor))
                    ids = [*ids, donor]
            table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
            found = torch.tensor(ids, dtype=torch.int64), table[:, 0].contiguous(), table[:, 1].contiguous()
            if len(self.known) < REMEMBERED:
                self.known[pending] = found
        return found

    def __call__(self, heads: Sequence[tuple[float, bytes, Tensor]], prior: Tensor) -> Tensor:
        """Log-probabilities (V,) of the anchor's next token; heads: score, pending bytes, next scores (D,)."""
        prior = prior.double().exp()
        inside = (1 - EVEN) * prior + EVEN * self.even
        found = [(score, scores, self.fits(pending)) for score, pending, scores in heads]
        masses = [scores[ids].double() + score for score, scores, (ids, _, _) in found]
        top = max((float(m.max()) for m in masses if len(m)), default=0.0)
        out = torch.zeros_like(inside)
        for mass, (_, _, (ids, place, token)) in zip(masses, found, strict=True):
            shares = inside[token]
            total = inside.new_zeros(len(ids)).index_add_(0, place, shares).clamp(min=1e-300)
            out.index_add_(0, token, ((mass - top).exp() / total)[place] * shares)
        mass = out.sum()
        out = (1 - FLOOR) * out / mass + FLOOR * prior if bool(mass > 0) else prior
        return out.log()

    def _specials(self) -> dict[int, int]:
        a, d = self.anchor, self.donor
        pairs = {i: d.literals[t] for t, i in a.literals.items() if t in d.literals}
        pairs.update({a.roles[r]: d.roles[r] for r in ("pad", "unk", "bos", "eos") if r in a.roles and r in d.roles})
        return {i: j for i, j in pairs.items() if i < self.size}


@dataclass(frozen=True)
class Head:
    """A way to spell what was read: donor tokens, the bytes pending after them, and what the donor says next.

    score: log-probability of the tokens, up to a constant of the row. scores (D,): of the next token; in_order:
    the same in byte order.
    """

    ids: tuple[int, ...]
    score: float
    pending: bytes
    scores: Tensor
    in_order: Tensor


class Reader:
    """One donor reading one row: a beam of heads, and one KV cache that goes back to where they part."""

    def __init__(self, projection: Projection) -> None:
        self.projection, self.donor = projection, projection.donor
        self.cache, self.cached = DynamicCache(), list[int]()
        self.heads: list[Head] = []
        self.closed = tuple(self.donor.lead)  # ids before the text that is being read
        self.text, self.read, self.full = b"", 0, False

    def take(self, model: Any, token: int) -> None:
        """Read one token of the anchor."""
        anchor = self.projection.anchor
        data = anchor.tokens[token] if token < len(anchor.tokens) else None
        if not self.heads and not self.read:
            self._begin(model)
        if data is None:
            twin = self.projection.special.get(token)
            # A row may begin with the anchor's own mark of a beginning: the donor has put its own.
            if twin is not None and (self.read or not self.closed):
                self.closed = (*self._spelt(), twin)
                self._begin(model)
        else:
            for byte in data[not self.text and anchor.dummy and data.startswith(b" ") :]:
                self.text += bytes([byte])
                self.heads = self._step(model, byte)
            if self.text and not self.heads:
                self._begin_again(model)
        self.read += 1

    def predict(self, prior: Tensor) -> Tensor:
        """Log-probabilities (V,) of the anchor's next token; `prior` (V,): what the anchor predicts."""
        if self.full or not self.heads:
            return prior.double()
        return self.projection([(h.score, h.pending, h.scores) for h in self.heads], prior)

    def _begin(self, model: Any) -> None:
        """The next text begins, after the closed ids."""
        self.text = b""
        self.heads = self._evaluate(model, [(self.closed, 0.0)]) if self.closed else []
        if self.donor.dummy and self.heads:
            self.heads = self._step(model, ord(" "))

    def _begin_again(self, model: Any) -> None:
        """Nothing spells the text, or nothing stood before it: go on after the tokenizer's own cut."""
        ids = (*self.closed, *self.donor.encode(self.text))
        self.heads = self._evaluate(model, [(ids, 0.0)]) if ids else []

    def _spelt(self) -> tuple[int, ...]:
        whole = [h for h in self.heads if not h.pending]
        return max(whole, key=lambda h: h.score).ids if whole else (*self.closed, *self.donor.encode(self.text))

    def _step(self, model: Any, byte: int) -> list[Head]:
        """The heads one byte later: those that still cover it, and those whose token the byte completes."""
        kept: list[tuple[float, Head]] = []
        ended: list[tuple[tuple[int, ...], float]] = []
        for head in self.heads:
            pending = head.pending + bytes([byte])
            low, high = self.donor.range(pending)
            place = low - 1
            while place >= 0 and self.donor.texts[place] == pending:
                ended.append(((*head.ids, self.donor.order[place]), head.score + float(head.in_order[place])))
                place -= 1
            if low < high:
                mass = head.score + float(head.in_order[low:high].logsumexp(0))
                kept.append((mass, replace(head, pending=pending)))
        scores = sorted([mass for mass, _ in kept] + [score for _, score in ended], reverse=True)
        if not scores:
            return []
        least = max(scores[0] + math.log(LIGHT), scores[:HEADS][-1])
        heads = [head for mass, head in kept if mass >= least]
        heads += self._evaluate(model, [(ids, score) for ids, score in ended if score >= least])
        return [replace(head, score=head.score - scores[0]) for head in heads]

    def _evaluate(self, model: Any, sequences: list[tuple[tuple[int, ...], float]]) -> list[Head]:
        """Ask the donor what follows each token sequence."""
        out: list[Head] = []
        limit = getattr(model.config, "max_position_embeddings", None)
        for ids, score in sequences:
            if limit is not None and len(ids) > limit:
                self.full = True
                return []
            same = next(
                (i for i, (a, b) in enumerate(zip(ids, self.cached, strict=False)) if a != b),
                min(len(ids), len(self.cached)),
            )
            same = min(same, len(ids) - 1)  # the last token is read again: only the cache was kept
            if same < len(self.cached):
                self.cache.crop(same - len(self.cached))
            new = torch.tensor([ids[same:]], device=next(model.parameters()).device)
            with torch.no_grad():
                logits = model(new, use_cache=True, **{CACHE: self.cache}).logits[0, -1]
            self.cached = list(ids)
            logits = logits[: len(self.donor.tokens)].cpu().double()
            scores = torch.log_softmax(logits, -1)
            out.append(Head(ids, score, b"", scores, scores[self.projection.donor_order]))
        return out


class Readers:
    """A donor's readers, one per row of the batch; stands where other experts have a KV cache."""

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self.rows: list[Reader] = []

    def reset(self) -> None:
        """Forget everything."""
        self.rows = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        picked = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.rows = [_copy(self.rows[i]) for i in picked.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.rows = [_copy(row) for row in self.rows for _ in range(repeats)]


def _copy(reader: Reader) -> Reader:
    out = copy.copy(reader)
    out.cache = copy.deepcopy(reader.cache)
    return out
