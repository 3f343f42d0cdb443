"""A skill's texts: files -> documents -> three parts that never overlap.

Documents are ordered by sha256(seed, text) and dealt out by characters: the first tenth to test, the next
tenth to validation, the rest to calibration. The order knows nothing but the text itself, so the split does
not depend on file names or order, and a document that occurs twice (in one file or in two) lands in one
part. Repeats are dropped. In every part the documents stay in hash order, a shuffle: the first rows
represent all files.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.calibrate.files import BLOCK, Chat, Source, cut, read_sources
from polymerge.calibrate.packing import Rows, adds_bos, pack
from polymerge.errors import TextError

__all__ = ["PARTS", "Rows", "Skill", "adds_bos", "first", "pack", "pairs", "read_skill", "shared_documents"]

PARTS = ("calibration", "validation", "test")
HELD_OUT = 0.1  # of the characters, for validation and for test each
ENOUGH = 30  # documents; with fewer, blocks are made smaller
SMALLEST = 125  # characters in the smallest block
NEEDED = 1000  # characters in all; below that no part can tell anything


@dataclass(frozen=True)
class Skill:
    """What one expert is good at: documents in three disjoint parts.

    files: name, sha256, characters. written: documents among them that the expert wrote itself (`written.py`).
    """

    name: str
    calibration: list[str]
    validation: list[str]
    test: list[str]
    files: tuple[tuple[str, str, int], ...] = ()
    seed: int = 0
    written: int = 0

    def digest(self) -> str:
        """sha256 over the three parts, document by document."""
        parts = (getattr(self, part) for part in PARTS)
        return hashlib.sha256("".join(_digest(documents) for documents in parts).encode()).hexdigest()

    def split_record(self) -> dict[str, Any]:
        """The split, for the lock: the files, and size and hash of each part. No absolute path in it."""
        return {
            "seed": self.seed,
            "digest": self.digest(),
            "written": self.written,
            "files": [{"name": name, "sha256": digest, "characters": size} for name, digest, size in self.files],
            "parts": {
                part: {
                    "documents": len(documents),
                    "characters": sum(map(len, documents)),
                    "sha256": _digest(documents),
                }
                for part, documents in ((part, getattr(self, part)) for part in PARTS)
            },
        }


def read_skill(
    name: str, paths: Sequence[Path], *, field: str = "text", chat: Chat | None = None, seed: int = 0
) -> Skill:
    """Read a skill's texts and split them 80/10/10 by characters.

    paths: text files, JSON(L) files or folders of them (see `files.py`). field: a JSON object's key. chat: how its
    `messages` are written. Raises TextError: missing, empty, not UTF-8, no such field, too short.
    """
    try:
        sources = list(read_sources(paths, field, chat))
        documents = _documents(sources)
        calibration, validation, test = _deal(documents, seed)
    except TextError as error:
        raise TextError(f"text of {name!r}: {error}") from error
    files = tuple((s.label, hashlib.sha256(s.data).hexdigest(), sum(map(len, s.records))) for s in sources)
    return Skill(name, calibration, validation, test, files, seed)


def skill_of(name: str, documents: Sequence[str], *, seed: int = 0, written: int = 0) -> Skill:
    """Documents split as `read_skill` splits them. Raises TextError: too few."""
    try:
        return Skill(name, *_deal(_enough(documents), seed), seed=seed, written=written)
    except TextError as error:
        raise TextError(f"text of {name!r}: {error}") from error


def pairs(paths: Sequence[Path], *, field: str = "text", chat: Chat | None = None) -> list[tuple[str, str]]:
    """(prompt, answer) of every JSON record that has both, in file order; empty where there are none."""
    return [pair for source in read_sources(paths, field, chat) for pair in source.pairs]


def shared_documents(one: Skill, other: Skill) -> int:
    """How many test documents of `one` are calibration or validation documents of `other`: a leak."""
    seen = frozenset(other.calibration) | frozenset(other.validation)
    return sum(document in seen for document in one.test)


def first(documents: Iterable[str], tokenizer: Any, tokens: int) -> list[str]:
    """The first so many tokens of the documents, as texts."""
    kept: list[str] = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
        if not ids:
            continue
        kept.append(tokenizer.decode(ids))
        tokens -= len(ids)
    return kept


def _documents(sources: Sequence[Source]) -> list[str]:
    """Distinct documents, in file order; blocks get smaller until there are enough of them."""
    block = BLOCK
    while True:
        found = dict.fromkeys(
            document
            for source in sources
            for record in source.records
            for document in ((record,) if source.whole else cut(record, block))
            if document.strip()
        )
        if len(found) >= ENOUGH or block // 2 < SMALLEST:
            break
        block //= 2
    return _enough(list(found))


def _enough(documents: Sequence[str]) -> list[str]:
    """The documents, if every part can have some."""
    characters = sum(map(len, documents))
    if characters < NEEDED or len(documents) < len(PARTS):
        raise TextError(
            f"{len(documents)} distinct documents with {characters} characters found; {len(PARTS)} and {NEEDED}"
            f" are needed to split into {', '.join(PARTS)}: add text"
        )
    return list(documents)


def _deal(documents: Sequence[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """Calibration, validation, test."""
    ordered = sorted(documents, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    share = HELD_OUT * sum(map(len, ordered))
    test, rest = _take(ordered, share)
    validation, calibration = _take(rest, share)
    return calibration, validation, test


def _take(documents: Sequence[str], characters: float) -> tuple[list[str], list[str]]:
    """At least one document from the front, as many as bring it nearest to `characters`; and the others."""
    count, size = 1, len(documents[0])
    # One long document among few could take them all: some stay behind for the other parts.
    while count < len(documents) - 2 and size + len(documents[count]) / 2 <= characters:
        size += len(documents[count])
        count += 1
    return list(documents[:count]), list(documents[count:])


def _digest(documents: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for document in documents:
        whole.update(hashlib.sha256(document.encode()).digest())
    return whole.hexdigest()
