"""Experts of a union whose tokenizer is not the anchor's: they read bytes, and predict the anchor's tokens.

A donor reads the row's bytes s, cut by its own tokenizer into d_1..d_j. Its next tokens w that cover s,

    from each boundary i of the last ones:   P(d_1..d_i) p(w | d_1..d_i),   w begins with the bytes after i,

are the covering sequences of Phan et al. (2024) along the canonical cut; so " the" read so far may go on as
" there". Their masses are normalised, and what w holds beyond s, the remainder r, says which anchor tokens fit:
the first token of the anchor's cut of r, and all anchor tokens that begin with r and are longer. A mass is shared
among those that fit as the anchor-tokenizer experts predict them: a donor with shorter tokens says how the
anchor's token begins, the anchor how it goes on. The result is a distribution over the anchor's tokens that
depends on nothing but what was read. `FLOOR` of it is the anchor's own prediction, so that nothing is impossible.

Where a donor cannot speak (nothing read and no token to begin with, a longer text than its positions hold) its
prediction is the anchor's.

This file travels with a union checkpoint and imports torch, tokenizers and transformers only. Offsets are in
bytes, scores in nats. V: the anchor's tokens, D: the donor's.
"""

import bisect
import copy
import json
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache

FLOOR = 1e-3  # share of a donor's prediction that is the anchor's
EVEN = 1e-3  # share of the anchor's prediction that is even where it shares out a donor's mass
HEADS = 8  # boundaries looked back at; a token that covers more of the donor's own tokens is rare
REMEMBERED = 4096  # remainders whose fitting tokens are kept


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

    def encode(self, data: bytes) -> tuple[list[int], bytes]:
        """Token ids of a text, and the bytes they spell: the text, perhaps with a space in front.

        Bytes that are not UTF-8 (a character's first bytes, so far) become single-byte tokens.
        """
        ids: list[int] = []
        spelt = b""
        while data:
            try:
                text, bad, rest = data.decode(), b"", b""
            except UnicodeDecodeError as error:
                text, bad, rest = data[: error.start].decode(), data[error.start : error.end], data[error.end :]
            found = self._ids(text) if text else []
            ids += found
            spelt += self._spelt(found)
            ids += [self.single[b] for b in bad if b in self.single]
            spelt += bytes(b for b in bad if b in self.single)
            data = rest
        return ids, spelt

    def first(self, data: bytes) -> int | None:
        """The first token of these bytes as they are cut in the middle of a text."""
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            if self.kind != "byte-level" and error.start == 0:
                return self.single.get(data[0])
            text = data[: error.start].decode()
            if self.kind == "byte-level":
                text = "".join(self.alphabet[b] for b in data)
                found = [t.id for t in self.backend.model.tokenize(text)]
                return self._known(found)
        if self.kind == "byte-level" and not self.dummy:
            return self._known(self._ids(text))
        written = "".join(self.alphabet[b] for b in data) if self.kind == "byte-level" else text.replace(" ", self.space)
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
        self.order = torch.tensor(anchor.order, dtype=torch.int64)
        self.even = torch.zeros(size, dtype=torch.float64)
        self.even[self.order] = 1 / max(len(anchor.order), 1)
        self.special = self._specials()
        self.known: dict[bytes, tuple[Tensor, Tensor, Tensor]] = {}

    def to_donor(self, token: int) -> int | None:
        """The donor's token for a special token of the anchor."""
        return self.special.get(token)

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


class Reader:
    """One donor reading one row: its tokens, its KV cache, and what it predicted after each token."""

    def __init__(self, projection: Projection) -> None:
        self.projection, self.cache = projection, DynamicCache()
        self.closed = list(projection.donor.lead)  # ids before the text that is still growing
        self.text, self.read = b"", 0
        self.ids: list[int] = []
        self.scores: list[Tensor | None] = [None]  # after i tokens
        self.sums = [0.0]
        self.full = False

    def take(self, model: Any, token: int) -> None:
        """Read one token of the anchor."""
        p = self.projection
        data = p.anchor.tokens[token] if token < len(p.anchor.tokens) else None
        if data is None:
            twin = p.to_donor(token)
            # A text's first token may be the anchor's own mark of a beginning; the donor has put its own.
            if self.read or not self.closed:
                self.closed += p.donor.encode(self.text)[0] + ([] if twin is None else [twin])
            self.text = b""
        else:
            drop = not self.text and p.anchor.dummy and data.startswith(b" ")
            self.text += data[drop:]
        self.read += 1
        self._advance(model)

    def predict(self, prior: Tensor) -> Tensor:
        """Log-probabilities (V,) of the anchor's next token; `prior` (V,): what the anchor predicts."""
        if self.full:
            return prior.double()
        spelt = b"".join(self.projection.donor.tokens[i] or b"" for i in self.ids[len(self.closed) :])
        if spelt not in (self.text, b" " + self.text):  # normalised text: only what follows it is known
            spelt = b""
            where = [len(self.ids)]
        elif not self.text and self.projection.donor.dummy:
            spelt, where = b" ", [len(self.ids)]
        else:
            where = list(range(len(self.ids), max(len(self.closed) - 1, len(self.ids) - HEADS), -1))
        heads, pending = [], b" " if not self.text and spelt else b""
        for at in where:
            if at < len(self.ids):
                pending = (self.projection.donor.tokens[self.ids[at]] or b"") + pending
            if len(pending) >= self.projection.donor.longest:
                break
            scores = self.scores[at]
            if scores is not None:
                heads.append((self.sums[at], pending, scores))
        return self.projection(heads, prior) if heads else prior.double()

    def _advance(self, model: Any) -> None:
        ids = self.closed + self.projection.donor.encode(self.text)[0]
        limit = getattr(model.config, "max_position_embeddings", None)
        self.full = self.full or (limit is not None and len(ids) > limit)
        same = next((i for i, (a, b) in enumerate(zip(ids, self.ids, strict=False)) if a != b), min(len(ids), len(self.ids)))
        if self.full or (same == len(ids) == len(self.ids)):
            return
        if same < len(self.ids):
            self.cache.crop(-(len(self.ids) - same))
            del self.scores[same + 1 :], self.sums[same + 1 :], self.ids[same:]
        new = ids[same:]
        if not new:
            return
        device = next(model.parameters()).device
        with torch.no_grad():
            logits = model(torch.tensor([new], device=device), past_key_values=self.cache, use_cache=True).logits[0]
        logits = logits[:, : len(self.projection.donor.tokens)]
        rows = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1).cpu()
        for token, row in zip(new, rows, strict=True):
            before = self.scores[-1]
            self.sums.append(self.sums[-1] + (0.0 if before is None else float(before[token])))
            self.scores.append(row)
        self.ids = ids
        for at in range(max(0, len(ids) - 4 * HEADS)):  # never looked back at
            self.scores[at] = None


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
    out.closed, out.ids, out.scores, out.sums = list(reader.closed), list(reader.ids), list(reader.scores), list(reader.sums)
    return out
