"""Text files of any common kind, read into documents.

A folder is walked in sorted order. `.jsonl` (`.ndjson`) is one object a line, `.json` a list of objects: a document is
the object's `field`, or else its `prompt` (or `question`) followed by its `answer` (or `completion`), or else its
`messages` as a chat template writes them. Any other file is plain text, cut at line ends into blocks of about `BLOCK`
characters, so that a single long book can be split too. Each may be compressed (`.gz`). A table (`TABLES`) that is
named itself is refused.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge._suggest import closest
from polymerge.errors import TextError

BLOCK = 2000  # characters
_OBJECT = re.compile(r"\s*\{")
RECORDS = {".json": re.compile(r"\s*\[\s*\{"), ".jsonl": _OBJECT, ".ndjson": _OBJECT}
"""How a file of records begins, by its ending."""
TABLES = {".csv": "read_csv(FILE)", ".tsv": "read_csv(FILE, sep='\\t')", ".parquet": "read_parquet(FILE)"}
"""Which column is the text they do not say; how pandas reads them."""
Chat = Callable[[list[Any]], str]
"""Messages, each with a role and a content, as one text."""
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class Source:
    """One file's content. label: its path below what the user named, the same on every machine.

    records: one text a record (JSON kinds) or the whole file; whole: records are documents and are not cut.
    pairs: the (prompt, answer) of records that have both.
    """

    label: str
    data: bytes
    records: tuple[str, ...]
    whole: bool
    pairs: tuple[tuple[str, str], ...] = ()


def read_sources(paths: Sequence[Path], field: str, chat: Chat | None = None) -> Iterator[Source]:
    """Read files and folders in the order given, conversations by `chat`; raises TextError."""
    if not paths:
        raise TextError("no text files given; expected at least one file or folder")
    for path in paths:
        files, found = _walk(path), 0
        for file in files:
            source = _read(file, _label(path, file), field, chat, named=file == path)
            if source is not None:
                found += 1
                yield source
        if not found:
            raise TextError(
                f"{path}: none of its {len(files)} files is text (UTF-8, not empty); expected text files in it"
            )


def cut(text: str, block: int) -> Iterator[str]:
    """Cut at line ends into pieces of about `block` characters; a line longer than two blocks is cut inside.

    Joining the pieces gives the text back.
    """
    piece = ""
    for line in _LINE.findall(text):
        parts = [line] if len(line) <= 2 * block else [line[i : i + block] for i in range(0, len(line), block)]
        for part in parts:
            piece += part
            if len(piece) >= block:
                yield piece
                piece = ""
    if piece:
        yield piece


def _walk(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TextError(f"{path}: does not exist; expected a text file or a folder of them")
    files = [
        p
        for p in sorted(path.rglob("*"))
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
    ]
    if not files:
        raise TextError(f"{path}: an empty folder; expected text files in it")
    return files


def _label(path: Path, file: Path) -> str:
    return file.name if path == file else (Path(path.name) / file.relative_to(path)).as_posix()


def _read(file: Path, label: str, field: str, chat: Chat | None, *, named: bool) -> Source | None:
    """Read one file; one that is no text is an error where it was named itself, and skipped in a folder."""
    packed = file.suffix.lower() == ".gz"
    kind = (file.with_suffix("") if packed else file).suffix.lower()
    if named and kind in TABLES:
        raise TextError(
            f"{file}: is a table; expected text or JSON records. Convert it:"
            f" `pandas.{TABLES[kind]}.to_json('FILE.jsonl', orient='records', lines=True)`, and set `field` to the"
            " column of its text"
        )
    try:
        data = file.read_bytes()
        if packed:
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"{file}: not readable ({getattr(error, 'strerror', None) or error})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not named:
            return None
        raise TextError(
            f"{file}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); expected UTF-8 text."
            f" Convert it: `iconv -f ORIGINAL -t UTF-8`"
        ) from error
    if not text.strip():
        if not named:
            return None
        raise TextError(f"{file}: is empty; expected text")
    if "\0" in text and not named:
        return None
    # In a folder of code a .json file that does not begin as records do (package.json) is text like the others.
    if kind not in RECORDS or not (named or RECORDS[kind].match(text)):
        return Source(label, data, (text.replace("\r\n", "\n"),), whole=False)
    items = list(_items(file, kind, text))
    records = [_document(where, item, field, chat) for where, item in items]
    pairs = [pair for _, item in items if (pair := _pair(item)) is not None]
    return Source(label, data, tuple(r for r in records if r.strip()), whole=True, pairs=tuple(pairs))


def _items(file: Path, kind: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each record of a JSON or JSONL file."""
    if kind == ".json":
        found = _json(f"{file}", text, "; where each line is an object, call the file .jsonl")
        if not isinstance(found, list):
            raise TextError(f"{file}: holds a JSON {type(found).__name__}; expected a list of objects")
        records = [(f"{file}: item {i}", item) for i, item in enumerate(found)]
    else:
        # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
        lines = [(f"{file}: line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        records = [(where, _json(where, line)) for where, line in lines]
    for where, item in records:
        if not isinstance(item, dict):
            raise TextError(f"{where} is a JSON {type(item).__name__}; expected an object")
        yield where, item


def _json(where: str, text: str, of_lines: str = "") -> Any:
    """`of_lines`: what to say where more follows a whole object."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = of_lines if getattr(error, "msg", "") == "Extra data" else ""
        raise TextError(f"{where}: not JSON ({error}){hint}") from error


def _pair(item: dict[str, Any]) -> tuple[str, str] | None:
    prompt, answer = item.get("prompt"), item.get("answer", item.get("completion"))
    if prompt is None and isinstance(item.get("question"), str):
        prompt = item["question"] + "\n"
    return (prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None


def _document(where: str, item: dict[str, Any], field: str, chat: Chat | None) -> str:
    """The text of one record."""
    pair = _pair(item)
    if field in item:
        text = item[field]
    elif pair is not None:
        text = pair[0] + pair[1]
    elif isinstance(item.get("messages"), list):
        text = _told(where, item["messages"], chat)
    else:
        near = closest(field, item)
        hint = f"; did you mean field {near!r}?" if near else "; set `field` to one of them"
        raise TextError(
            f"{where} has no field {field!r} (nor `prompt` and `answer`, nor `messages`), but {sorted(item)}{hint}"
        )
    if not isinstance(text, str):
        raise TextError(f"{where}: field {field!r} is of type {type(text).__name__}; expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{where}: field {field!r} has half a surrogate pair, not a character ({error})") from error
    return text


def _told(where: str, messages: list[Any], chat: Chat | None) -> str:
    """A conversation as text."""
    if chat is None:
        raise TextError(
            f"{where} holds `messages`, but the tokenizer has no chat template to write them by; give `text`"
        )
    try:
        return chat(messages)
    except Exception as error:  # whatever a template does with what it was not made for
        raise TextError(f"{where}: the chat template does not take its `messages` ({error})") from error
