"""Byte spans of tokens in a text, and the byte positions at which two tokenizations of it meet.

Boundaries b_0 = 0 <= b_1 <= ... <= b_n = bytes of the text: token i covers bytes b_i .. b_{i+1}. Where the
bytes of the tokens, put together, are the text (up to one dummy space in front), boundaries are their
cumulated lengths, so that a token may end inside a character. Elsewhere (normalized text, unknown tokens, a
dummy space in the middle) they come from the tokenizer's character offsets, and only tokens that share a
character are told apart by their lengths. Text that no token covers counts with the token before it (an
accent that NFC has put into its letter), from its first space on with the token after it (spaces that
WordPiece drops).

A dummy space in front covers no byte. Special tokens that the text spells out cover their literal.
"""

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from polymerge.align.token_bytes import ByteView, as_view
from polymerge.errors import TextError

_LONGER = (0x80, 0x800, 0x10000)  # UTF-8 takes one byte more from each of these code points on


def spans(tokenizer: Any, text: str) -> Int64[Tensor, " boundary"]:
    """Byte offsets (tokens + 1,) of the token boundaries in `text.encode()`; see `encode`."""
    return encode(tokenizer, text)[1]


def encode(tokenizer: Any, text: str) -> tuple[Int64[Tensor, " token"], Int64[Tensor, " boundary"]]:
    """Token ids (tokens,) and boundaries (tokens + 1,), no special tokens put around the text.

    tokenizer: a transformers fast tokenizer, or its ByteView (much faster for many texts).
    A text of which the tokenizer keeps nothing gives no ids and the boundary [0].
    Raises TextError for text that is not valid Unicode, PreflightError for a tokenizer that is not fast.
    """
    view = as_view(tokenizer, words=True)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"character {error.start} is a lone surrogate; expected text that UTF-8 can hold: remove it"
        ) from error
    found = view.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    ids = torch.tensor(found["input_ids"], dtype=torch.int64)
    return ids, _boundaries(view, text, data, ids, found["offset_mapping"])


def _boundaries(
    view: ByteView, text: str, data: bytes, ids: Int64[Tensor, " token"], offsets: list[tuple[int, int]]
) -> Int64[Tensor, " boundary"]:
    pieces = [view.surface[i] for i in ids.tolist()]
    joined = b"".join(pieces)
    out = torch.zeros(len(ids) + 1, dtype=torch.int64)
    if joined in (data, b" " + data):
        dummy = len(joined) - len(data)
        out[1:] = view.lengths[ids].cumsum(0) - dummy
    elif pieces:
        out[1:] = torch.tensor(by_offsets(text, data, pieces, offsets))
    return out


def by_offsets(text: str, data: bytes, pieces: list[bytes], offsets: list[tuple[int, int]]) -> list[int]:
    """Ends of tokens in bytes from their character ranges; `pieces` are their bytes."""
    points = torch.frombuffer(bytearray(text.encode("utf-32-le") or b"\0" * 4), dtype=torch.int32)
    widths = 1 + sum((points >= first).long() for first in _LONGER)
    before = [0, *torch.as_tensor(widths).cumsum(0).tolist()]  # bytes before character i
    firsts = [first for first, _ in offsets[1:]] + [len(text)]
    out: list[int] = []
    at = 0
    for piece, (_, last), first in zip(pieces, offsets, firsts, strict=True):
        gap = last
        while gap < first and not text[gap].isspace():
            gap += 1
        following, end = before[first], before[gap]
        place = end
        if following < end:  # the next token covers a part of the same character
            # Spaces are never cut, so a lone one that shares a character was put in front of it.
            dummy = piece == b" " or (piece[:1] == b" " and data[at : at + 1] != b" ")
            place = min(max(at + len(piece) - dummy, following), end)
        at = max(at, place)
        out.append(at)
    out[-1] = len(data)
    return out


def common_boundaries(
    a_spans: Int64[Tensor, " a"], b_spans: Int64[Tensor, " b"]
) -> tuple[Int64[Tensor, " common"], Int64[Tensor, " common"]]:
    """Indices i, j of the boundaries at the same byte: a_spans[i] == b_spans[j], both strictly increasing.

    Tokens a[i_k : i_{k+1}] and b[j_k : j_{k+1}] cover the same bytes, and all tokens are covered: of several
    boundaries at one byte (tokens without bytes) it is the last, except at the start, where it is boundary 0.
    """
    a_bytes, a_index = _distinct(a_spans)
    b_bytes, b_index = _distinct(b_spans)
    place = torch.searchsorted(b_bytes, a_bytes).clamp_max(len(b_bytes) - 1)
    same = b_bytes[place] == a_bytes
    return a_index[same], b_index[place[same]]


def _distinct(boundaries: Int64[Tensor, " x"]) -> tuple[Int64[Tensor, " y"], Int64[Tensor, " y"]]:
    values, counts = torch.unique_consecutive(boundaries, return_counts=True)
    index = counts.cumsum(0) - 1
    if len(values) > 1:
        index[0] = 0
    return values, index
