"""What every page of a report shares: one HTML file that needs nothing else, its parts, and its tables."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from polymerge.errors import OutputError

_STYLE = Path(__file__).with_name("page.css")
_SORT = Path(__file__).with_name("sort.js")
_UNKNOWN = ("–", "diverged")
_NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?(?= ±|$)")
_LEADING = re.compile(r"(?:over )?([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?=\s|$)")
Titled = Iterable[tuple[str, str]]


def document(title: str, lead: str, body: str, foot: str, *, sortable: bool = False) -> str:
    """The whole page; `body` is HTML, all else is text. A page with sortable tables is wide and has their script."""
    script = f"<script>\n{_SORT.read_text(encoding='utf-8')}</script>\n" if sortable else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f'<body><main{" class=wide" if sortable else ""}>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>'
        f"\n{body}\n<footer>{escape(foot)}</footer>\n</main>{script}</body></html>\n"
    )


def save(path: Path | str, text: str) -> None:
    """Write a page. Raises OutputError when the place cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def folder(path: Path) -> None:
    """Make a folder for pages. Raises OutputError when it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made ({error.strerror}); choose another place") from error


def joined(sections: Titled) -> str:
    """Sections of (title, HTML), without those that are empty."""
    return "\n".join(f"<section><h2>{escape(title)}</h2>\n{text}</section>" for title, text in sections if text)


def facts(cells: Titled) -> str:
    """Boxes of (figure, what it is) side by side."""
    boxes = "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in cells)
    return f'<div class="facts">{boxes}</div>'


def prose(text: str) -> str:
    """Paragraphs, lists, `code` and *emphasis* of Markdown as HTML: what the texts of the leaderboard use."""
    return "\n".join(_block(block) for block in text.split("\n\n"))


def _block(block: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(block, quote=False))
    text = re.sub(r"\*(\w[^*]*)\*", r"<em>\1</em>", text)
    if text.startswith("- "):
        return "<ul>" + "".join(f"<li>{line.removeprefix('- ')}</li>" for line in text.split("\n")) + "</ul>"
    return f"<p>{text}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool]) -> str:
    """A table; columns of numbers are right-aligned, marked rows are bold."""
    kind = _kinds(header, rows)
    head = "".join(f"<th{k}>{escape(h)}</th>" for h, k in zip(header, kind, strict=True))
    lines = [
        f"<tr{' class=worst' if bold else ''}>"
        + "".join(f"<td{k}>{escape(cell)}</td>" for cell, k in zip(row, kind, strict=True))
        + "</tr>"
        for row, bold in zip(rows, marked, strict=True)
    ]
    return _framed(head, [("", lines)])


def sortable(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    last: Sequence[Sequence[str]] = (),
    *,
    marked: Sequence[bool] = (),
    code: Sequence[str] = (),
) -> str:
    """A table that a click on a heading sorts.

    Args:
        header: the headings.
        rows: cells as text; a number may have a spread behind it.
        last: rows that stay below, whatever is sorted by.
        marked: which of `rows` are bold; default none.
        code: headings of columns whose cells are commands, shown on a click.
    """
    kind = _kinds(header, [*rows, *last])
    head = "".join(
        f'<th{k} aria-sort="none"><button type="button">{escape(h)}</button></th>'
        for h, k in zip(header, kind, strict=True)
    )

    def line(row: Sequence[str], *, bold: bool) -> str:
        shown = [_command(cell) if h in code else escape(cell) for cell, h in zip(row, header, strict=True)]
        cells = [
            f'<td{k} data-sort="{escape(_key(cell))}">{text}</td>'
            for cell, text, k in zip(row, shown, kind, strict=True)
        ]
        return f"<tr{' class=worst' if bold else ''}>{''.join(cells)}</tr>"

    bold = marked or [False] * len(rows)
    bodies = [("", [line(row, bold=b) for row, b in zip(rows, bold, strict=True)])]
    return _framed(head, [*bodies, (' class="last"', [line(row, bold=False) for row in last])], ' class="sortable"')


def _command(cell: str) -> str:
    """A long command, folded away."""
    return escape(cell) if cell == "–" else f"<details><summary>command</summary><code>{escape(cell)}</code></details>"


def _framed(head: str, bodies: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    made = "".join(f"<tbody{k}>{''.join(lines)}</tbody>" for k, lines in bodies if lines)
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>{made}</table></div>'


def _kinds(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The attribute of each column: `n` for numbers."""
    return [' class="n"' if all(_is_number(row[i]) for row in rows) else "" for i in range(len(header))]


def _is_number(cell: str) -> bool:
    return cell in _UNKNOWN or _NUMBER.match(cell) is not None


def _key(cell: str) -> str:
    """What a cell is sorted by: the number that it begins with, nothing where there is no score, else its text."""
    found = _LEADING.match(cell)
    return "" if cell in _UNKNOWN else found[1].replace(",", "") if found else cell
