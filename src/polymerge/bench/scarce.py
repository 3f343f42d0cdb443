"""The table of little text: the same experts and size, and ever fewer different tokens of each skill to merge by."""

import math
from collections.abc import Sequence
from statistics import mean

from polymerge.bench import board, methods
from polymerge.bench.rows import Row, judged

TITLE = "Little text"
ABOUT = (
    "Worst skill, bits per byte over its owner (means over seeds), when a method may read so many different tokens of"
    " each skill, as often as it likes; *+ written*: and what each expert goes on to write, to as many tokens as a fold"
    " reads by default; *all*: what it reads elsewhere on this page. Rates and settings are chosen on the same"
    " validation text everywhere."
)


def text(row: Row) -> tuple[int, bool] | None:
    """Different tokens of each skill that a row's method may read, and whether the experts write more; None: all."""
    heal = row.setting.get("heal", {})
    return None if heal.get("text") is None else (heal["text"], bool(heal.get("written")))


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each pair, profile and budget that has cases of little text, under a title."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.key):
        if experts := row.setting.get("heal", {}).get("experts"):
            found.setdefault((row.profile, row.budget, *experts), []).append(row)
    return sorted(
        (f"{' + '.join(experts)}, {budget} ({profile})", some)
        for (profile, budget, *experts), some in found.items()
        if any(map(text, some))
    )


def tables(rows: Sequence[Row]) -> list["board.Table"]:
    """A table for each of the groups, a line for each method; best first where there is least text."""
    made = []
    about = {name: group for name, (group, _) in methods.known().items()}
    for title, some in groups(rows):
        counts = sorted({n for r in some if (n := text(r))})
        lines, cannot = [], []
        for method, its in board.by(some, "method"):
            scores = [
                mean(known) if (known := [s for r in its if text(r) == n and (s := judged(r)) is not None]) else None
                for n in (*counts, None)
            ]
            first = [board.name_of(method), about.get(method, "rival")]
            line = [*first, *map(board.number, scores)]
            if any(s is not None for s in scores):
                lines.append(([math.inf if s is None else s for s in scores], method, line))
            else:
                cannot.append(line)
        head = ["method", "group", *(f"{n:,}{' + written' * more}" for n, more in counts), "all"]
        made.append(board.Table(f"{TITLE}: {title}", ABOUT, head, [line for *_, line in sorted(lines)], cannot))
    return made
