"""Bits per byte of experts with different tokenizers, and of their mixture, on the same bytes.

Every expert reads a document cut by its own tokenizer. The document falls into chunks at the byte boundaries
that all tokenizers share, and the gate sees one piece of evidence per chunk: the log-probability that each
expert gave to the chunk's bytes (of its own tokens for them, a lower bound of the sum over all tokens).

    p(chunk_n | before) = Σ_k w_k(n) p_k(chunk_n | before),    bits per byte = -Σ_n log2 p(chunk_n) / bytes

With alpha = 0 that is Σ_k p_k(document)/K: per document at most ln K nats more than the best expert. It is
what mixing costs when nothing is lost at boundaries. The union *model* must predict the anchor's tokens one by
one; what it loses against this figure is the boundary cost (see `_union_donors.Projection`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from polymerge.align.spans import encode
from polymerge.align.token_bytes import ByteView, byte_view
from polymerge.calibrate.packing import adds_bos
from polymerge.errors import TextError
from polymerge.methods._union_gate import BayesGate


@dataclass(frozen=True)
class UnionScore:
    """Bits per byte of the mixture and of each expert alone, over `bytes` bytes in `chunks` chunks."""

    union: float
    experts: dict[str, float]
    bytes: int
    chunks: int


def score_union(
    sources: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
    texts: Sequence[str | bytes],
    alpha: float,
    *,
    length: int = 256,
    limit: int | None = None,
) -> UnionScore:
    """Score the experts and their mixture on documents; one pass of every expert over them.

    Args:
        sources: name -> anything with `log_probs(tokens (rows, time)) -> (rows, time - 1)`, as `Source` has.
        tokenizers: name -> fast tokenizer (or its ByteView), the same names.
        texts: documents; a long one is cut, at common boundaries, into windows of at most `length` tokens of
            every tokenizer. Each window begins with the beginning token (else the end token) and starts the
            gate anew. A window is scored from its first byte on, unless some tokenizer has neither token:
            then its first chunk is context for everybody.
        alpha: share of the gate's weight that is spread evenly after every chunk.
        length: tokens of a window, the leading one included.
        limit: at most so many windows.

    Raises:
        TextError: a document is not UTF-8, no chunk fits into a window, or nothing is left to score.
        PreflightError: a tokenizer is not fast.
    """
    names = list(sources)
    views = [v if isinstance(v := tokenizers[name], ByteView) else byte_view(v) for name in names]
    leads = [lead(view) for view in views]
    skip = 0 if all(leads) else 1
    windows: list[_Window] = []
    for text in texts:
        for window in _windows(views, _decoded(text), length, skip):
            if limit is None or len(windows) < limit:
                windows.append(window)
        if limit is not None and len(windows) >= limit:
            break
    if not windows:
        raise TextError("the documents give no chunk of text to score; expected longer ones")
    evidence = torch.stack(
        [
            _evidence(sources[name], [w.ids[k] for w in windows], [w.ends[k] for w in windows], leads[k], skip)
            for k, name in enumerate(names)
        ],
        dim=-1,
    )
    counts = torch.tensor([len(w.ends[0]) - skip for w in windows])
    real = torch.arange(evidence.shape[1]) < counts[:, None]
    gate = BayesGate(torch.full((len(names),), 1 / len(names), dtype=torch.float64), alpha)
    start = gate.start(len(windows))
    after = gate.scan(start, evidence, real)
    mixed = (torch.cat([start[:, None], after[:, :-1]], dim=1) + evidence).logsumexp(-1)
    size = sum(w.bytes for w in windows)
    per_byte = -1 / (math.log(2) * size)
    alone = {name: float(evidence[..., k][real].sum()) * per_byte for k, name in enumerate(names)}
    return UnionScore(float(mixed[real].sum()) * per_byte, alone, size, int(counts.sum()))


@dataclass(frozen=True)
class _Window:
    """ids[k] (tokens,): of tokenizer k; ends[k] (chunks,): how many of them end each chunk; bytes: scored."""

    ids: list[Tensor]
    ends: list[Tensor]
    bytes: int


def _windows(views: Sequence[ByteView], text: str, length: int, skip: int) -> Iterator[_Window]:
    """A document's windows; every chunk is in one, and each tokenizer has at most `length` - 1 tokens in it."""
    found = [encode(view, text) for view in views]
    if any(len(ids) == 0 for ids, _ in found):
        return
    common = _common([bounds for _, bounds in found])
    # Last boundary at a byte: tokens without bytes belong to the chunk before them.
    places = torch.stack([torch.searchsorted(bounds, common, right=True) - 1 for _, bounds in found])
    places[:, 0] = 0
    first = 0
    while first < len(common) - 1:
        room = (places - places[:, first, None] < length).all(0)
        room[:first] = True
        last = int(room.long().cumprod(0).sum()) - 1
        if last == first:
            raise TextError(
                f"a chunk of {int(common[first + 1] - common[first])} bytes between common token boundaries does "
                f"not fit into a window of {length} tokens; expected a larger `length`"
            )
        if last - first > skip:
            cuts = [(int(p[first]), int(p[last])) for p in places]
            yield _Window(
                [ids[i:j] for (ids, _), (i, j) in zip(found, cuts, strict=True)],
                [p[first + 1 : last + 1] - p[first] for p in places],
                int(common[last] - common[first + skip]),
            )
        first = last


def _common(all_bounds: Sequence[Tensor]) -> Int64[Tensor, " common"]:
    """Byte positions that are a token boundary for everybody, ascending."""
    common: Tensor = torch.unique(all_bounds[0])
    for bounds in all_bounds[1:]:
        common = common[torch.isin(common, bounds)]
    return common


def _evidence(
    source: Any, ids: list[Tensor], ends: list[Tensor], lead: list[int], skip: int
) -> Float64[Tensor, "window chunk"]:
    """Log-probability of every chunk under one expert; 0 after a window's last chunk."""
    longest = len(lead) + max(len(row) for row in ids)
    rows = torch.zeros(len(ids), longest, dtype=torch.int64)  # what follows the text is never scored
    for i, row in enumerate(ids):
        rows[i, : len(lead) + len(row)] = torch.cat([torch.tensor(lead, dtype=torch.int64), row])
    before = torch.zeros(len(ids), 2 - len(lead), dtype=torch.float64)
    # Column j: log-probability of the first j tokens of the text. Without a lead the first one is not predicted.
    total = torch.cat([before, source.log_probs(rows).double().cpu()], dim=1).cumsum(1)
    out = torch.zeros(len(ids), max(len(e) for e in ends) - skip, dtype=torch.float64)
    for i, end in enumerate(ends):
        at: Tensor = total[i, torch.cat([torch.zeros(1, dtype=torch.int64), end])[skip:]]
        out[i, : len(at) - 1] = at.diff()
    return out


def lead(view: ByteView) -> list[int]:
    """The token that comes before a text: the beginning token if the tokenizer puts one, else the end token."""
    wanted = ("bos", "eos") if adds_bos(view.tokenizer) else ("eos", "bos")
    return [view.roles[role] for role in wanted if role in view.roles][:1]


def _decoded(text: str | bytes) -> str:
    try:
        return text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise TextError(f"byte {error.start} of a document is not UTF-8; expected text") from error
