"""How many tokens the padded anchor is distilled on until it is where ours is: from the curves that the rows keep."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from polymerge.bench import board
from polymerge.bench.rows import Row

CONTROL = "anchor_distill_more"
TITLE = "Tokens until distilling is where ours is"
ABOUT = (
    "Worst skill on validation text, where healing chooses its state, bits per byte over the owner: of the fold, of the"
    " healed fold and of the padded anchor in its one long run. *There after*: the tokens that this run has read when"
    " it is as good; over: it never is. (Its rate is still high on the way: a run meant for fewer tokens would be there"
    " sooner.) The fold itself reads its calibration tokens and heals on none."
)


def tables(rows: Sequence[Row]) -> list["board.Table"]:
    """A table for each profile: the cells (case and seed) in which the fold's healing and the control have curves."""
    found = []
    for profile, some in board.by([r for r in rows if r.metric == "bits per byte"], "profile"):
        cells: dict[tuple[str, int], dict[str, list[Mapping[str, Any]]]] = {}
        for row in sorted(some, key=lambda r: r.key):
            if curve := row.extra.get("curve"):
                finite: list[Mapping[str, Any]] = [{**point, "worst": _finite(point["worst"])} for point in curve]
                cells.setdefault((row.case, row.seed), {})[row.method] = finite
        lines = [
            _line(*cell, curves["fold_heal"], curves[CONTROL])
            for cell, curves in cells.items()
            if curves.keys() >= {"fold_heal", CONTROL}
        ]
        head = ["case", "seed", "fold", "there after", "healed", "tokens", "there after", "control", "tokens"]
        found.append(board.Table(f"{TITLE} ({profile})", ABOUT, head, lines))
    return found


def _line(case: str, seed: int, ours: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]]) -> list[str]:
    best = min(ours, key=lambda point: point["worst"])
    end = min(control, key=lambda point: point["worst"])
    sides = [(ours[0], []), (best, [f"{ours[-1]['tokens']:,}"])]
    parts = [[board.number(point["worst"]), *more, _there(control, point["worst"])] for point, more in sides]
    return [case, str(seed), *parts[0], *parts[1], board.number(end["worst"]), f"{control[-1]['tokens']:,}"]


def _finite(worst: float | None) -> float:
    """A point's worst skill: rows keep null of one that is no number."""
    return math.inf if worst is None else worst


def _there(curve: Sequence[Mapping[str, Any]], worst: float) -> str:
    """Tokens read when a curve is first as good."""
    first = next((point["tokens"] for point in curve if point["worst"] <= worst), None)
    return f"over {curve[-1]['tokens']:,}" if first is None else f"{first:,}"
