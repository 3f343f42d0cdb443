"""Documents -> rows of tokens of one length, and the bytes of text that the scored tokens stand for.

All documents become one stream, a separator token between them; rows are cut from it without overlap or
padding and the remainder is dropped. In a row of length T the tokens at positions 1..T-1 are scored
(predicted from those before), so bits per byte divides by the bytes of exactly those tokens.

Bytes of a token come from the tokenizer's character offsets: each token gets the text from the furthest end
seen so far to its own end. A character spread over several byte-level tokens is counted once, at the first
of them; text the tokenizer skipped counts with the next token; the rest after the last token counts with
it. So the sum over a document is always `len(document.encode())`. Separators stand for 0 bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from polymerge.errors import TextError

_LONGER = (0x80, 0x800, 0x10000)
_CHUNK = 64  # documents encoded together: parallel enough, and little is encoded beyond `limit`


@dataclass(frozen=True)
class Rows:
    """tokens (rows, length); bytes: of the text that positions 1..length-1 of all rows stand for."""

    tokens: Int64[Tensor, "rows length"]
    bytes: int


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before a text: the model expects one, then."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos]


def pack(
    tokenizer: Any,
    documents: Sequence[str],
    length: int,
    *,
    limit: int | None = None,
    bos: bool = False,
) -> Rows:
    """Cut documents into rows of `length` tokens; at most `limit` rows.

    tokenizer: a transformers fast tokenizer. Documents are separated by its eos token if it has one.
    bos: start every row with the bos token (never scored) and separate documents by it instead.
    Raises TextError when there is not enough text for one row.
    """
    if length <= 1:  # one token to predict from, one to predict
        raise TextError(f"rows of {length} tokens score nothing; expected a length of 2 or more")
    if not getattr(tokenizer, "is_fast", False):
        raise TextError(f"{type(tokenizer).__name__} is not a fast tokenizer; character offsets are needed")
    if bos and tokenizer.bos_token_id is None:
        raise TextError("`bos` is set, but the tokenizer has no bos token")
    lead = [tokenizer.bos_token_id] if bos else []
    body = length - len(lead)  # tokens of a row that come from the stream
    separator = tokenizer.bos_token_id if bos else tokenizer.eos_token_id
    ids: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    sizes: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    total = 0
    for tokens, spans in _encode(tokenizer, documents):
        if ids and separator is not None:
            ids.append(np.array([separator]))
            sizes.append(np.array([0]))
            total += 1
        ids.append(tokens)
        sizes.append(spans)
        total += len(tokens)
        if limit is not None and total >= limit * body:
            break
    count = total // body if limit is None else min(limit, total // body)
    if count < 1:
        raise TextError(f"the text gives {total} tokens; one row needs {body}: add text or make rows shorter")
    stream = np.concatenate(ids)[: count * body].reshape(count, body)
    spent = np.concatenate(sizes)[: count * body].reshape(count, body)
    if lead:
        stream = np.concatenate([np.full((count, 1), lead[0]), stream], axis=1)
    scored = spent if lead else spent[:, 1:]
    return Rows(torch.from_numpy(stream.astype(np.int64)), int(scored.sum()))


def _encode(
    tokenizer: Any,
    documents: Sequence[str],
) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]]:
    """(token ids, bytes of each token) of every document that gives any token."""
    for start in range(0, len(documents), _CHUNK):
        chunk = list(documents[start : start + _CHUNK])
        found = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
        for text, ids, offsets in zip(chunk, found["input_ids"], found["offset_mapping"], strict=True):
            if ids:
                yield np.array(ids, dtype=np.int64), token_bytes(text, np.array(offsets, dtype=np.int64))


def token_bytes(text: str, offsets: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """UTF-8 bytes of each token of one document; offsets (tokens, 2) are character ranges."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    # UTF-8 takes one byte more from each of these code points on.
    widths = 1 + sum((points >= first).astype(np.int64) for first in _LONGER)
    before = np.concatenate([[0], np.cumsum(widths)])  # bytes before character i
    ends = np.maximum.accumulate(offsets[:, 1])
    ends[-1] = len(points)
    return np.diff(before[ends], prepend=0)
