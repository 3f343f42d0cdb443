"""Whether two tokenizers are one: models that share it can be merged token by token.

Vocabularies of one size with other tokens average rows of unrelated tokens without any error, so sizes alone
say nothing: the bytes behind every id, the special roles and the way in which texts are cut are compared.
"""

from dataclasses import dataclass
from typing import Any, Literal

from polymerge.align.token_bytes import ROLES, ByteView, as_view

_SHOWN = 3


@dataclass(frozen=True)
class Difference:
    """How two tokenizers differ.

    what: `size`, `bytes`, `special` and `role` are about the meaning of token ids; `cut` only about which ids
    a text becomes (embeddings may be merged row by row, but positions of one text don't correspond).
    """

    what: Literal["size", "bytes", "special", "role", "cut"]
    message: str

    def __str__(self) -> str:
        return self.message


def same_vocabulary(a: Any, b: Any) -> list[Difference]:
    """What differs between two fast tokenizers (or ByteViews); empty when they are interchangeable.

    Works for every kind of tokenizer. Raises PreflightError for one that is not fast.
    """
    left, right = as_view(a, words=True), as_view(b, words=True)
    out = _tokens(left, right)
    for role in ROLES:
        x, y = left.roles.get(role), right.roles.get(role)
        if x != y:
            out.append(Difference("role", f"the {role} token has id {x} and {y}"))
    out.extend(
        Difference("cut", f"texts are cut in different ways: the {key} differs")
        for key in ("normalizer", "pre_tokenizer", "model")
        if left.description[key] != right.description[key]
    )
    return out


def _tokens(left: ByteView, right: ByteView) -> list[Difference]:
    out: list[Difference] = []
    if len(left.pieces) != len(right.pieces):
        out.append(Difference("size", f"vocabularies of {len(left.pieces)} and {len(right.pieces)} tokens"))
    tokens, marks = [], []
    for i in range(min(len(left.pieces), len(right.pieces))):
        if left.surface[i] != right.surface[i]:
            tokens.append(f"{i}: {_show(left.surface[i])} and {_show(right.surface[i])}")
        elif left.special[i] != right.special[i]:
            marks.append(f"{i}: {_show(left.surface[i])}")
    if tokens:
        out.append(Difference("bytes", f"{len(tokens)} ids stand for other bytes ({_list(tokens)})"))
    if marks:
        out.append(Difference("special", f"{len(marks)} ids are special in one only ({_list(marks)})"))
    return out


def _show(data: bytes) -> str:
    return repr(data)[1:] if data else "nothing"


def _list(found: list[str]) -> str:
    return "; ".join(found[:_SHOWN]) + ("; ..." if len(found) > _SHOWN else "")
