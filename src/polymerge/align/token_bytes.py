"""The bytes that each token of a fast tokenizer stands for.

The kind of alphabet is read from the tokenizer's own description (tokenizer.json), never from a class name:

- `byte-level`: a ByteLevel step; 256 printable characters stand for the bytes (Radford et al., GPT-2, 2019);
- `metaspace`: U+2581 or the like stands for a space, through a Metaspace or Replace step; `<0xNN>` are single
  bytes where the model has byte fallback (Kudo & Richardson, SentencePiece, 2018);
- `words`: WordPiece-like, a prefix marks the tokens inside a word (Schuster & Nakajima, 2012); spaces are not
  kept;
- `plain`: the token is its own text.

In the kind `words` no token holds a space, so the bytes are a convention: a token that begins a word gets a
space in front, except a lone punctuation mark or ideograph. That is refused where exact bytes are asked for.
Steps that change the text before it is cut (NFC, lower case) leave the bytes of tokens exact; they are listed
in `ByteView.lossy`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from polymerge.errors import PreflightError

# eos first: where one token has several roles (GPT-2's <|endoftext|>), the one that models predict decides.
ROLES = ("eos", "bos", "unk", "pad")
FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_KEPT = {"Prepend", "ByteLevel"}  # normalizers that lose nothing
_DROPPING = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"}
_IN_UTF8 = [*range(0xC0), *range(0xC2, 0xF5)]  # bytes that occur in UTF-8
_IDEOGRAPHS = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters are themselves, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    table = {chr(b): b for b in printable}
    table.update({chr(256 + n): b for n, b in enumerate(hidden)})
    return table


CHARACTER_BYTE = _byte_alphabet()
BYTE_CHARACTER = {b: c for c, b in CHARACTER_BYTE.items()}


@dataclass(frozen=True, eq=False)
class ByteView:
    """A tokenizer and the bytes of its tokens; the index of every tuple is the token id.

    pieces: tokens as stored ("" for an id that no token has). surface: bytes a token covers in a text, for
    special tokens their literal. special: true for special tokens and unused ids. roles: special id of each
    role that the tokenizer has. space: the character that stands for a space (kind `metaspace`). lossy: steps
    after which a text is not what its tokens say. description: tokenizer.json without its vocabulary.
    """

    tokenizer: Any = field(repr=False)
    kind: str
    pieces: tuple[str, ...] = field(repr=False)
    surface: tuple[bytes, ...] = field(repr=False)
    special: tuple[bool, ...] = field(repr=False)
    roles: Mapping[str, int]
    space: str
    lossy: tuple[str, ...]
    lengths: Int64[Tensor, " token"] = field(repr=False)
    description: Mapping[str, Any] = field(repr=False)

    @property
    def bytes(self) -> list[bytes | None]:
        """Exact bytes of every token id; None for special tokens and unused ids."""
        return [None if s else b for s, b in zip(self.special, self.surface, strict=True)]


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The exact bytes of every token id, None for special tokens.

    tokenizer: a transformers fast tokenizer, or its ByteView.
    Raises PreflightError for a tokenizer whose tokens don't determine bytes (kind `words`), or that is not
    fast.
    """
    return as_view(tokenizer).bytes


def as_view(tokenizer: Any, *, words: bool = False) -> ByteView:
    """The byte view of a tokenizer; a ready view passes through.

    words: accept a tokenizer whose tokens have bytes by convention only.
    Raises PreflightError for such a tokenizer otherwise. Who made the view has seen `lossy`: a view always
    passes.
    """
    if isinstance(tokenizer, ByteView):
        return tokenizer
    view = byte_view(tokenizer)
    if view.kind == "words" and not words:
        raise PreflightError(
            f"{_name(tokenizer)} is a WordPiece tokenizer, whose tokens do not say where spaces are; "
            "expected byte-level, SentencePiece-like or plain tokens: pass byte_view(tokenizer) to accept "
            "approximate bytes"
        )
    return view


def byte_view(tokenizer: Any) -> ByteView:
    """Read the alphabet of a transformers fast tokenizer. Raises PreflightError if it is not fast."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PreflightError(
            f"{_name(tokenizer)} is not a fast tokenizer; expected one with a tokenizer.json: convert it first"
        )
    description = json.loads(backend.to_str())
    model = description["model"]
    vocabulary = _vocabulary(model)
    kind, space = _kind(description)
    added = {t["id"]: t for t in description["added_tokens"]}
    roles = {r: i for r in ROLES if (i := getattr(tokenizer, f"{r}_token_id", None)) is not None}
    unknown = _unknown(model, vocabulary)
    size = 1 + max([*vocabulary.values(), *added, -1])
    pieces, surface, special = [""] * size, [b""] * size, [True] * size
    for piece, i in vocabulary.items():
        pieces[i], special[i] = piece, i in roles.values() or i == unknown
        surface[i] = piece.encode() if special[i] else _piece_bytes(piece, kind, space, model)
    for i, token in added.items():
        special[i] = token["special"] or i in roles.values() or (special[i] and pieces[i] != "")
        # What the model can also produce itself (Gemma's runs of spaces) is in the model's alphabet.
        if special[i] or not pieces[i]:
            surface[i] = token["content"].encode()
        pieces[i] = token["content"]
    known = {b for b, s in zip(surface, special, strict=True) if not s and len(b) == 1}
    brief = {k: v for k, v in description.items() if k != "model"}
    brief["model"] = {k: v for k, v in model.items() if k != "vocab"}
    return ByteView(
        tokenizer=tokenizer,
        kind=kind,
        pieces=tuple(pieces),
        surface=tuple(surface),
        special=tuple(special),
        roles=roles,
        space=space,
        lossy=tuple(_lossy(description, kind, space, known)),
        lengths=torch.tensor([len(b) for b in surface], dtype=torch.int64),
        description=brief,
    )


def steps(section: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, nested sequences laid flat."""
    if section is None:
        return
    if section["type"] != "Sequence":
        yield section
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        for step in section.get(key, ()):
            yield from steps(step)


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    if isinstance(model["vocab"], dict):
        return dict(model["vocab"])
    return {entry[0]: i for i, entry in enumerate(model["vocab"])}  # Unigram: (piece, score) in id order


def _unknown(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    index = model.get("unk_id")
    return vocabulary.get(model.get("unk_token") or "") if index is None else int(index)


def _kind(description: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of alphabet, and the character that stands for a space in it."""
    normalizers = list(steps(description["normalizer"]))
    before = [*normalizers, *steps(description["pre_tokenizer"])]
    if any(s["type"] == "ByteLevel" for s in before):
        return "byte-level", BYTE_CHARACTER[0x20]
    for step in before:
        if step["type"] == "Metaspace":
            return "metaspace", str(step["replacement"])
        if _is_space(step):
            return "metaspace", str(step["content"])
    model = description["model"]
    if model["type"] == "WordPiece" or model.get("continuing_subword_prefix"):
        return "words", " "
    return "plain", " "


def _is_space(step: Mapping[str, Any]) -> bool:
    """Whether a normalizer step writes one visible character for each space."""
    return step["type"] == "Replace" and step["pattern"] == {"String": " "} and len(step["content"]) == 1


def _piece_bytes(piece: str, kind: str, space: str, model: Mapping[str, Any]) -> bytes:
    if kind == "byte-level":
        found = [CHARACTER_BYTE.get(c) for c in piece]
        known = [b for b in found if b is not None]
        return bytes(known) if len(known) == len(found) else piece.encode()  # as the ByteLevel decoder does
    if kind == "metaspace":
        match = FALLBACK.fullmatch(piece) if model.get("byte_fallback") else None
        return bytes([int(match[1], 16)]) if match else piece.replace(space, " ").encode()
    if kind == "words":
        prefix = model.get("continuing_subword_prefix") or "##"
        if piece.startswith(prefix) and piece != prefix:
            return piece[len(prefix) :].encode()
        alone = len(piece) == 1 and (not piece.isalnum() or _IDEOGRAPHS.match(piece))
        return piece.encode() if alone else b" " + piece.encode()
    return piece.encode()


def _lossy(description: Mapping[str, Any], kind: str, space: str, known: set[bytes]) -> Iterator[str]:
    """Why a text may differ from the bytes of its tokens."""
    for step in steps(description["normalizer"]):
        if step["type"] not in _KEPT and not (_is_space(step) and step["content"] == space):
            yield f"normalizer {step['type']} changes the text"
    for step in steps(description["pre_tokenizer"]):
        removed = step.get("behavior") == "Removed" and not step.get("invert")
        if step["type"] in _DROPPING or removed:
            yield f"pre-tokenizer {step['type']} drops what separates words"
    fallback = kind == "byte-level" or description["model"].get("byte_fallback")
    missing = sum(bytes([b]) not in known for b in _IN_UTF8)
    if not fallback:
        yield "no byte fallback: characters outside the vocabulary become the unknown token or nothing"
    elif missing:
        yield f"{missing} bytes have no token of their own"
