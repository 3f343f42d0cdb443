"""A language model over tokens read as one over bytes: the reference that approximations are measured against.

A token sequence *covers* a byte string when it spells the string and only its last token may go on past the end.
The probability that a text begins with the string is the sum over all covering sequences (Phan et al., "Exact
byte-level probabilities from tokenized language models", 2024; Vieira et al., "From language models over tokens
to language models over characters", 2024).

The state is a beam of heads. A head is a token sequence that ends at or before the end of the string, and the
bytes still pending after it; it stands for all tokens that begin with the pending bytes and are longer. Without
a `width` all heads are kept and the sum is exact, for any tokenizer: no cut is assumed to be the canonical one.
With a width the heaviest heads are kept, which can only lower a probability; models trained on canonical cuts
give the others little.

Cost: one call of the model per head that a byte completes. No cache: this is for small models and short texts.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

END = 256  # the index of the end of the text beside the 256 bytes


@dataclass(frozen=True)
class Head:
    """Tokens read, their log-probability, bytes pending, log-probabilities of the next token in byte order."""

    ids: tuple[int, ...]
    score: float
    pending: bytes
    sorted_scores: Tensor


class ByteModel:
    """Byte probabilities of a token model, in nats.

    Args:
        predict: token ids read so far (without what comes before a text) -> log-probabilities (tokens,) of the
            next token.
        tokens: bytes of every token id, None for special tokens.
        end: the token that ends a text. Other special tokens never occur in a text: their mass is lost.
        width: heads kept; default all, which is exact.
    """

    def __init__(
        self,
        predict: Callable[[tuple[int, ...]], Tensor],
        tokens: Sequence[bytes | None],
        *,
        end: int | None = None,
        width: int | None = None,
    ) -> None:
        self.predict, self.end, self.width = predict, end, width
        pairs = sorted((b, i) for i, b in enumerate(tokens) if b)
        self.texts = [b for b, _ in pairs]
        self.ids = [i for _, i in pairs]
        self.order = torch.tensor(self.ids, dtype=torch.int64)

    def start(self) -> list[Head]:
        """The state before the first byte."""
        return [self._head((), 0.0)]

    def read(self, state: list[Head], byte: int) -> list[Head]:
        """The state one byte later; empty when no token sequence spells the string."""
        out: list[Head] = []
        for head in state:
            pending = head.pending + bytes([byte])
            low, whole, high = self._range(pending)
            for place in range(low, whole):  # several tokens may have the same bytes
                score = head.score + float(head.sorted_scores[place])
                out.append(self._head((*head.ids, self.ids[place]), score))
            if whole < high:
                out.append(replace(head, pending=pending))
        if self.width is not None and len(out) > self.width:
            out.sort(key=self._mass, reverse=True)
            del out[self.width :]
        return out

    def log_mass(self, state: list[Head]) -> float:
        """Log-probability that a text begins with the string."""
        return _log_sum([self._mass(head) for head in state])

    def next_byte(self, state: list[Head]) -> Float64[Tensor, "257"]:
        """Log-probabilities of the next byte and, at `END`, of the end of the text, given the string."""
        parts: list[list[float]] = [[] for _ in range(END + 1)]
        for head in state:
            _, low, high = self._range(head.pending)
            at = len(head.pending)
            while low < high:
                byte = self.texts[low][at]
                after = _after(head.pending + bytes([byte]))
                last = high if after is None else bisect.bisect_left(self.texts, after, low, high)
                parts[byte].append(head.score + float(head.sorted_scores[low:last].logsumexp(0)))
                low = last
            if not head.pending and self.end is not None:
                parts[END].append(head.score + float(head.sorted_scores[-1]))
        out = torch.tensor([_log_sum(p) for p in parts], dtype=torch.float64)
        return torch.log_softmax(out, 0)

    def log_probability(self, data: bytes) -> float:
        """Log-probability that a text begins with these bytes."""
        state = self.start()
        for byte in data:
            state = self.read(state, byte)
        return self.log_mass(state)

    def _head(self, ids: tuple[int, ...], score: float) -> Head:
        scores = self.predict(ids).double()
        last = scores[self.end] if self.end is not None else scores.new_tensor(-math.inf)
        return Head(ids, score, b"", torch.cat([scores[self.order], last[None]]))

    def _mass(self, head: Head) -> float:
        _, low, high = self._range(head.pending)
        mass = head.sorted_scores[low:high].logsumexp(0)
        if not head.pending:
            mass = torch.logaddexp(mass, head.sorted_scores[-1])
        return head.score + float(mass)

    def _range(self, pending: bytes) -> tuple[int, int, int]:
        """Places low..whole of tokens that are the pending bytes, whole..high of those that go on after them."""
        low = bisect.bisect_left(self.texts, pending)
        whole = bisect.bisect_right(self.texts, pending)
        after = _after(pending)
        return low, whole, len(self.texts) if after is None else bisect.bisect_left(self.texts, after)


def _after(start: bytes) -> bytes | None:
    """The next string in byte order that does not begin with `start`; None if there is none."""
    stripped = start.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None


def _log_sum(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).logsumexp(0)) if values else -math.inf
