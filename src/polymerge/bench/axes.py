"""The axis table of the text suite: what each difference between two experts costs, ours against the best others.

A line is a case; a cell is the worst skill's bits per byte over its owner, the mean over seeds. A line that the best
rival or control wins is marked.
"""

from collections.abc import Sequence
from statistics import mean

from polymerge.bench import board, methods
from polymerge.bench.rows import Row, judged
from polymerge.bench.text_experts import AXES

OURS = ("union", *board.FOLDS)
CONTROL = "anchor_distill"
ABOUT = (
    "Worst skill, bits per byte over its owner, of experts that differ in one thing (seed: same architecture; all:"
    " every axis at once but the tokenizer; base, bases: both tuned from one model, or from two of different width)."
    " *Best rival* and *best other control* are single models; a dash: no row."
)


def tables(rows: Sequence[Row]) -> list["board.Table"]:
    """A table for each profile; none without such cases."""
    found = []
    for profile, some in board.by([r for r in rows if r.setting.get("axis")], "profile"):
        order = {axis: i for i, axis in enumerate(AXES)}
        groups = sorted(board.by(some, "case"), key=lambda g: (g[1][0].budget, order.get(_axis(g[1]), 9), g[0]))
        head = ["axis", "budget", *map(board.name_of, OURS), board.name_of(CONTROL), "best other control", "best rival"]
        title = f"One axis of difference at a time ({profile})"
        found.append(board.Table(title, ABOUT, head, [_line(group) for _, group in groups]))
    return found


def _axis(rows: Sequence[Row]) -> str:
    return str(rows[0].setting["axis"])


def _line(rows: Sequence[Row]) -> list[str]:
    scores = {
        name: mean(some)
        for name, group in board.by(rows, "method")
        if (some := [score for r in group if (score := judged(r)) is not None])
    }
    groups = {name: group for name, (group, _) in methods.known().items()}
    others = {n: s for n, s in scores.items() if n not in (*board.SEVERAL, CONTROL)}
    controls = {n: s for n, s in others.items() if groups.get(n) == "control"}
    rivals = {n: s for n, s in others.items() if groups.get(n) in ("rival", "peer")}
    ours = min((scores[n] for n in board.FOLDS if n in scores), default=None)
    cells = [board.number(scores.get(n)) for n in (*OURS, CONTROL)]
    return [_axis(rows), rows[0].budget, *cells, _best(controls, ours), _best(rivals, ours)]


def _best(scores: dict[str, float], ours: float | None) -> str:
    """The least of them with its name, marked where it beats ours."""
    if not scores:
        return "–"
    name = min(scores, key=lambda n: (scores[n], n))
    wins = ours is not None and scores[name] < ours - 1e-9
    return f"{board.number(scores[name])} {board.name_of(name)}" + (" (wins)" if wins else "")
