"""Two text domains that every CPython >= 3.11 carries: English prose about Python, and Python source.

    code    the standard library's .py files without their docstrings (comments stay)
    prose   the docstrings taken out of those files, docstrings of C modules, the language reference behind
            `help()` (`pydoc_data.topics`), the licence and the few text files that lie beside the sources

So the two domains share names and subject but are different text, and nothing has to be downloaded.

Held out is a *module*, never a line: the name of a module's family (`_pydecimal`, `decimal` and their
submodules are one family) is hashed with SHA-256, and its code and its docstrings are held out together. A
model trained on either domain's train part has therefore seen nothing of a held-out module in any form, and
the rule gives the same answer for every Python version. Paragraphs that also occur in a held-out document of
the domain (the reference repeats itself) are removed from the train part.

All texts are `str`; sizes are in characters. Order is by name: the same on every machine.
"""

import ast
import hashlib
import html
import importlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from polymerge.errors import TextError

Domain = Literal["prose", "code"]
Part = Literal["train", "heldout"]

DOMAINS: tuple[Domain, ...] = ("prose", "code")
PARTS: tuple[Part, ...] = ("train", "heldout")

HELDOUT_SHARE = 0.16
HELDOUT_SALT = "demo"
"""Share of the families held out, and what is hashed before a name: chosen to hold out 250 kB of prose."""

SHORTEST_DOCSTRING = 100
SHORTEST_DOCUMENT = 200
SHORTEST_REPEAT = 60
"""Paragraphs shorter than this may occur in both parts: `return self` is no leak."""

# Tests are left out by Debian; the others are not the standard library's own, or are generated tables.
_SKIPPED_FOLDERS = frozenset({
    "__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload",
    "encodings", "ensurepip", "__phello__", "pydoc_data",
})  # fmt: skip
_SKIPPED_FILES = re.compile("_sysconfigdata.*|sitecustomize|usercustomize|__hello__|this|antigravity|entities|_vendor")

# Packages that some systems ship apart or that later versions dropped: train only, so that the held-out part
# is whole everywhere.
_OPTIONAL = frozenset({
    "idlelib", "tkinter", "turtle", "turtledemo", "distutils", "lib2to3", "dbm", "sqlite3",
    "curses", "venv", "posix",
})  # fmt: skip

# Pure-Python twins of C modules, and names under which another version keeps the same text.
_SAME_FAMILY = {
    "collections_abc": "collections",
    "compat_pickle": "pickle",
    "elementtree": "xml",
    "py_abc": "abc",
    "py_warnings": "warnings",
    "pydatetime": "datetime",
    "pydecimal": "decimal",
    "pyio": "io",
    "pylong": "int",
    "pyrepl": "repl",
    "weakrefset": "weakref",
}

# C modules that every build has; their docstrings are prose that exists in no .py file.
_C_MODULES = (
    "array", "atexit", "binascii", "builtins", "cmath", "_collections", "_csv", "_datetime",
    "errno", "faulthandler", "_functools", "gc", "_heapq", "_io", "itertools", "_json", "marshal",
    "math", "_operator", "_pickle", "posix", "_random", "select", "_signal", "_socket", "_sre",
    "_struct", "sys", "_thread", "time", "_tracemalloc", "unicodedata", "_weakref", "zlib",
)  # fmt: skip

# Text files beside the sources, where a system ships them.
_TEXT_FILES = (
    "LICENSE.txt", "email/architecture.rst", "idlelib/help.html", "idlelib/News3.txt",
    "idlelib/NEWS.txt", "idlelib/HISTORY.txt", "idlelib/extend.txt", "idlelib/README.txt",
    "turtledemo/about_turtle.txt", "ctypes/macholib/README.ctypes",
)  # fmt: skip

_DocstringOwner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def corpus(domain: Domain, part: Part) -> list[str]:
    """Documents of one domain's part, in a fixed order.

    Args:
        domain: "prose" or "code".
        part: "train", or "heldout" for the families no shipped expert has seen.

    Raises:
        TextError: an unknown domain or part.

    """
    if domain not in DOMAINS or part not in PARTS:
        raise TextError(f"corpus({domain!r}, {part!r}): expected a domain of {DOMAINS} and a part of {PARTS}")
    return list(_documents(domain, part)[0])


def write_heldout(folder: Path) -> dict[str, Path]:
    """Write `prose.txt` and `code.txt`, the held-out documents separated by two blank lines, into a folder.

    Returns:
        The path of each domain's file. The folder is made where it is missing; existing files are replaced.

    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for domain in DOMAINS:
        paths[domain] = folder / f"{domain}.txt"
        paths[domain].write_text("\n\n\n".join(corpus(domain, "heldout")) + "\n", encoding="utf-8")
    return paths


def family(name: str) -> str:
    """Give the unit that is held out as a whole: the top-level module, leading `_` and known twins folded."""
    top = name.split(".", 1)[0].lstrip("_")
    return _SAME_FAMILY.get(top, top)


def is_heldout(key: str) -> bool:
    """Whether the family or topic of this key belongs to the held-out part: a property of the name alone."""
    digest = hashlib.sha256(f"{HELDOUT_SALT} {key}".encode()).digest()
    return key not in _OPTIONAL and int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


@cache
def _documents(domain: Domain, part: Part) -> tuple[tuple[str, ...], frozenset[str]]:
    """One part's documents, each paragraph once and in one part only; and all paragraphs met on the way."""
    keyed = sorted(_code(part) if domain == "code" else _prose(part))
    seen = set(_documents(domain, "heldout")[1]) if part == "train" else set()  # membership only
    found = tuple(document for _, _, text in keyed if (document := _first_time(text, seen)))
    return found, frozenset(seen)


def _belongs(key: str, part: Part) -> bool:
    return is_heldout(key) == (part == "heldout")


def _first_time(text: str, seen: set[str]) -> str:
    """Drop the paragraphs seen before and remember the rest; empty when too little is left."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if not paragraph.strip():
            continue
        canonical = " ".join(paragraph.split())
        if len(canonical) >= SHORTEST_REPEAT:
            if canonical in seen:
                continue
            seen.add(canonical)
        kept.append(paragraph.rstrip())
    joined = "\n\n".join(kept).strip("\n")
    return joined if len(joined) >= SHORTEST_DOCUMENT else ""


@cache
def _sources(part: Part) -> tuple[tuple[str, str], ...]:
    """(dotted module name, source text) of the part's standard library files, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]  # tells os.walk where not to go
        for file in files:
            path = Path(folder, file)
            parts = path.relative_to(root).with_suffix("").parts
            if path.suffix != ".py" or any(_SKIPPED_FILES.fullmatch(name) for name in parts):
                continue
            name = ".".join(parts)
            if _belongs(family(name), part) and (text := _source(path)):
                found.append((name, text))
    return tuple(sorted(found))


def _source(path: Path) -> str:
    """Python source with spaces for tabs; empty for templates and for files in an old encoding."""
    try:
        text = path.read_text(encoding="utf-8")
        ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):
        return ""
    return text.replace("\f", "").expandtabs(8)


def _code(part: Part) -> Iterator[tuple[str, str, str]]:
    """(family, module, source without docstrings)."""
    for name, text in _sources(part):
        yield family(name), name, strip_docstrings(text)


def _prose(part: Part) -> Iterator[tuple[str, str, str]]:
    """(family or topic, name, prose); a module's docstrings make one document."""
    for name, text in _sources(part):
        yield family(name), name, _join(docstrings(text))
    for name in _C_MODULES:
        if _belongs(family(name), part):
            yield family(name), f"{name} (C)", _join(_c_docstrings(name))
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        if _belongs(f"topic {name}", part):
            yield f"topic {name}", name, text
    root = Path(sysconfig.get_path("stdlib"))
    for name in _TEXT_FILES:
        path, key = root / name, family(name.split("/", 1)[0])
        if path.is_file() and _belongs(key, part):
            text = path.read_text(encoding="utf-8", errors="ignore")
            yield key, name, _plain(text) if path.suffix == ".html" else text.expandtabs(8)


def strip_docstrings(source: str) -> str:
    """Python source without docstrings; a body that was only a docstring becomes `pass`. Comments stay."""
    lines = source.encode().split(b"\n")  # ast counts columns in bytes of UTF-8
    nodes = sorted(_docstring_nodes(ast.parse(source)), key=lambda found: found[1].lineno, reverse=True)
    for owner, node in nodes:
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        alone = not before.strip() and not after.strip()
        if alone and len(owner.body) > 1:
            del lines[first : last + 1]
        else:
            lines[first : last + 1] = [before + b"pass" + after]
    text = b"\n".join(lines).decode()
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))


def docstrings(source: str) -> list[str]:
    """Docstrings of a source text in order, dedented, without the short and the doctest-like ones."""
    nodes = sorted(_docstring_nodes(ast.parse(source)), key=lambda found: found[1].lineno)
    return [text for owner, _ in nodes if (text := _as_prose(ast.get_docstring(owner)))]


def _docstring_nodes(tree: ast.Module) -> Iterator[tuple[_DocstringOwner, ast.Expr]]:
    for node in ast.walk(tree):
        if isinstance(node, _DocstringOwner) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            if isinstance(statement, ast.Expr):
                yield node, statement


def _as_prose(text: str | None) -> str:
    """Return the docstring where it is long enough and mostly prose, else an empty string."""
    text = inspect.cleandoc(text or "").expandtabs(8)
    lines = [line for line in text.split("\n") if line.strip()]
    examples = sum(line.lstrip().startswith((">>>", "...")) for line in lines)
    return "" if len(text) < SHORTEST_DOCSTRING or 4 * examples > len(lines) else text


def _c_docstrings(name: str) -> list[str]:
    """Docstrings of a C module, its functions, its classes and their methods; empty where it is absent."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return []
    found = [module.__doc__]
    for _, member in sorted(vars(module).items()):
        if getattr(member, "__module__", None) not in {None, name, name.lstrip("_"), "builtins"}:
            continue
        found.append(_text_of(member))
        if isinstance(member, type):
            found.extend(_text_of(attribute) for _, attribute in sorted(vars(member).items()))
    return list(dict.fromkeys(text for item in found if (text := _as_prose(item))))


def _text_of(member: object) -> str | None:
    text = getattr(member, "__doc__", None)
    return text if isinstance(text, str) and not isinstance(member, str) else None


def _plain(page: str) -> str:
    """Text of an HTML page: the body's words, one blank line between blocks."""
    body = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", "", page)
    body = re.sub(r"</(p|div|dt|dd|h\d|li)>", "\n\n", body)
    text = html.unescape(re.sub(r"<[^>]*>", "", body))
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def _join(texts: Iterable[str]) -> str:
    return "\n\n".join(texts)
