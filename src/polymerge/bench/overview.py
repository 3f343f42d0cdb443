"""Every method at a glance: over all cells (case and seed) of a protocol, how well its worst skill fares."""

from collections.abc import Sequence
from statistics import median

from polymerge.bench import board, methods
from polymerge.bench.rows import Row, judged

KEPT = {"accuracy": 0.99, "bits per byte": 0.05}
"""A cell is kept whose worst skill is at least as accurate, or loses at most so many bits per byte to its owner."""
ABOUT = {
    "accuracy": "Worst skill of each cell: its accuracy. *Kept*: at 0.99 or more.",
    "bits per byte": "Worst skill of each cell: its bits per byte over its owner. *Kept*: at most 0.05.",
}
GROUPS = {"ours", "control", "rival"}


def tables(rows: Sequence[Row]) -> list["board.Table"]:
    """A table for each protocol and profile: the cells, two or more, in which ours, controls and rivals have rows."""
    kinds: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.key):
        kinds.setdefault((row.suite, str(row.setting.get("protocol", "")), row.profile), []).append(row)
    return [table for kind, some in kinds.items() if (table := _table(*kind, some))]


def _table(suite: str, protocol: str, profile: str, rows: Sequence[Row]) -> "board.Table | None":
    groups = {name: group for name, (group, _) in methods.known().items()}
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.case, row.seed), []).append(row)
    full = [some for some in cells.values() if {groups.get(r.method, "rival") for r in some} >= GROUPS]
    metric = next((r.metric for cell in full for r in cell if r.status == "ok"), "")
    if len(full) < 2 or not metric:  # noqa: PLR2004  one cell is its own table
        return None
    up = 1 if metric == "accuracy" else -1
    head = ["method", "group", "ran", "cannot", "kept", "median", "least good"]
    ranked, cannot = [], []
    for name, some in board.by([row for cell in full for row in cell], "method"):
        scores = [up * score for r in some if (score := judged(r)) is not None]
        first = [board.name_of(name), groups.get(name, "rival"), f"{len(scores)} of {len(full)}"]
        first.append(str(sum(r.status == "cannot" for r in some)))
        if scores:
            kept = sum(score >= up * KEPT[metric] for score in scores)
            line = [*first, str(kept), board.number(up * median(scores)), board.number(up * min(scores))]
            ranked.append((-median(scores), -min(scores), name, line))
        else:
            cannot.append([*first, *["–"] * 3])
    title = f"{' '.join(dict.fromkeys((suite, protocol)))} ({profile}), {len(full)} cells"
    return board.Table(title, ABOUT[metric], head, [line for *_, line in sorted(ranked)], cannot)
