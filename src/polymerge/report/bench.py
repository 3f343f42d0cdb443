"""The page of a benchmark: its tables, sorted by a click, and its figures; the same rows give the same bytes.

What the leaderboard says is said here as well, from the same tables (`polymerge.bench.board`).
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from polymerge.bench import board
from polymerge.bench.board import Section, Table
from polymerge.bench.rows import Row
from polymerge.report import bench_figures as draw
from polymerge.report import figures
from polymerge.report.page import document, facts, joined, prose, sortable

HEAT = (
    "The worst skill of every method on every case: accuracy, or bits per byte over its owner. Dark is the best of the"
    " case; pale is the anchor"
    " alone, or the median where that is worse, and everything below. Hatched: cannot, for the reason in the tables."
)
SIZES = (
    "Score of the worst skill against size, for cases that differ in their budget only; up is better. The anchor alone"
    " and the placebo are left out."
)
TEXTS = (
    "Score of the worst skill against the different tokens of each skill that a method may read; up is better. The"
    " anchor alone and the placebo are left out."
)
HEALING = "The worst skill on validation data while distilling, at the learning rate that was chosen; the ring is kept."
TRAINING = "Training from scratch, a line for each seed; dashed: step_val_acc_99."


def page(rows: Sequence[Row]) -> str:
    """The page as text."""
    rows = sorted(rows, key=lambda r: r.key)
    suites = [(suite, [r for r in rows if r.suite == suite]) for suite in dict.fromkeys(r.suite for r in rows)]
    lines = board.behind(rows)
    told = f"{board.OURS}\n\n" + "\n".join(f"- {line}" for line in (*board.counts(rows), *lines))
    parts = [(board.BEHIND, prose(told) if lines else "")]
    parts.append(("Every case and method", _drawn([(f"{s}: cases by methods", draw.heat(r)) for s, r in suites], HEAT)))
    parts.append(("Size and skill", _drawn([(f"{s}: size and skill", draw.sizes(r)) for s, r in suites], SIZES)))
    parts.append(("Text and skill", _drawn([(f"{s}: text and skill", draw.texts(r)) for s, r in suites], TEXTS)))
    parts += [(section.title, _section(section)) for section in board.sections(rows)]
    done = [r for r in rows if r.status == "ok"]
    counts: dict[str, set[Any]] = {
        "case": {(r.suite, r.case) for r in rows},
        "method": {r.method for r in rows},
        "seed": {r.seed for r in rows},
    }
    cells = [(str(len(some)), name + "s" * (len(some) > 1)) for name, some in counts.items()]
    cells.append((f"{len(done)} of {len(rows)}", "runs that could be done"))
    parts.append(("Of these rows", prose(board.preface(rows))))
    body = f"{facts(cells)}\n{joined(parts)}"
    lead = "A row for every method, case and seed. Figures are means over seeds, ± the standard deviation."
    names = " and ".join(suite for suite, _ in suites)
    foot = "Made from the rows alone. A click on a heading sorts a table."
    return document(f"Benchmark of merging: {names}", lead, body, foot, sortable=True)


def _section(section: Section) -> str:
    return prose(section.about) + "\n" + "\n".join(_table(table) for table in section.tables)


def _table(table: Table) -> str:
    """A table under its title, and the curves of its case."""
    parts = [f"<h3>{escape(table.title)}</h3>" if table.title else ""]
    parts.append(f'<p class="note">{escape(table.about)}</p>' if table.about else "")
    marked = ["ours" in line[1:2] for line in table.lines]
    parts.append(sortable(table.head, table.lines, table.cannot, marked=marked, code=("again",)))
    parts.append(_drawn([(f"{case}: healing", draw.healing(group)) for case, group in table.groups], HEALING))
    runs = [(f"{case}: training", draw.training(group)) for case, group in table.groups]
    parts.append(_drawn(runs, TRAINING, titled=True))
    return "\n".join(part for part in parts if part)


def _drawn(made: Sequence[tuple[str, Figure | None]], note: str, *, titled: bool = False) -> str:
    """The figures that there are, with one note; nothing without a figure."""
    shown = [(label, figure) for label, figure in made if figure is not None]
    if not shown:
        return ""
    parts = [f'<p class="note">{escape(note)}</p>']
    for label, figure in shown:
        caption = f"<figcaption>{escape(label.rpartition(':')[0])}</figcaption>" if titled else ""
        width = figure.get_figwidth() * 1.15
        parts.append(f'<figure style="max-width:{width:.1f}in">{caption}{figures.svg(figure, label)}</figure>')
    return "\n".join(parts)
