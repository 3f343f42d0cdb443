"""Figures of a benchmark, from its rows alone; each is None where there are no rows for it.

Every method has one line in all of them: ours blue and green, the distilled controls orange, what spends longer on
healing dashed, all else grey.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from polymerge.bench import board, scarce
from polymerge.bench.board import by, name_of
from polymerge.bench.methods import known
from polymerge.bench.rows import Row, judged
from polymerge.report.figures import FAINT, INK, PAPER, plain

COLOURS = {
    "union": "#009E73", "fold": "#56B4E9", "fold_heal": "#0072B2", "anchor_distill": "#D55E00",
    "scratch_distill": "#E69F00", "fold_heal_more": "#0072B2", "anchor_distill_more": "#D55E00",
}  # fmt: skip
DASHED = {"fold_heal_more", "anchor_distill_more"}
_PALE, _DEEP, _BLACK, _WHITE = (0.93, 0.95, 0.98), (0.0, 0.27, 0.5), "#111111", "#ffffff"
_SIZE = 8.5
_LEAST = 0.02
"""Scores nearer than this in a case, in the metric's units, get no contrast: it would show noise."""
_UNITS = {"bits per byte": "bits per byte over owner"}
Curve = tuple[list[float], list[float]]


def heat(rows: Sequence[Row]) -> Figure | None:
    """Cases × methods: what they are ranked by (`rows.judged`) as a number, its place within the case as a colour.

    The darkest is the case's best; the palest is the anchor alone, or the median where that is worse, and all below.
    """
    cases = board.cases([r for r in rows if r.method != "expert"])
    names = [m for m in known() if any(r.method == m for _, group in cases for r in group)]
    names += sorted({r.method for _, group in cases for r in group} - set(names))
    if not cases:
        return None
    longest = max(len(name_of(n)) for n in names)
    figure = Figure(figsize=(2.2 + 0.52 * len(names), 0.25 + 0.05 * longest + 0.3 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for y, (_, group) in enumerate(cases):
        shades = shades_of(group)
        for x, method in enumerate(names):
            some = [r for r in group if r.method == method]
            if some:
                _cell(axes, x, y, shades.get(method))
    axes.set_xlim(0, len(names))
    axes.set_ylim(len(cases), 0)
    axes.set_xticks([x + 0.5 for x in range(len(names))], [name_of(n) for n in names], rotation=50, ha="left")
    axes.set_yticks([y + 0.5 for y in range(len(cases))], [case for case, _ in cases])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, colors=INK, labelsize=_SIZE)
    axes.spines[:].set_visible(False)
    axes.patch.set_alpha(0)
    return figure


def shades_of(group: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Method -> (mean of what they are ranked by, shade from 0 to 1) of one case; without what was not measured."""
    scores = {
        method: mean(w)
        for method, some in by(group, "method")
        if (w := [score for r in some if (score := judged(r)) is not None])
    }
    up = 1 if group[0].metric == "accuracy" else -1
    known = {m: up * s for m, s in scores.items() if math.isfinite(s)}
    best = max(known.values(), default=0.0)
    floor = min(known.get("anchor", best), median(known.values()) if known else best, best - _LEAST)
    return {m: (s, min(1.0, max(0.0, (up * s - floor) / (best - floor)))) for m, s in scores.items()}


def sizes(rows: Sequence[Row]) -> Figure | None:
    """Parameters against the worst skill: a panel for each group of cases that differ in their budget only."""
    groups: dict[str, list[Row]] = {}
    for title, group in board.cases(rows):
        budget = group[0].budget
        if budget and group[0].case.endswith(f"/{budget}"):
            measured = [r for r in group if r.status == "ok" and r.parameters]
            groups.setdefault(title.replace(f"/{budget}", "", 1), []).extend(measured)
    shown = {name: group for name, group in groups.items() if len({r.budget for r in group}) > 1}
    return _panels(shown, lambda r: r.budget, lambda r: (r.parameters or 0) / 1e6, "million parameters")


def texts(rows: Sequence[Row]) -> Figure | None:
    """Different tokens of each skill against the worst skill: a panel for each pair that has cases of little text.

    Those in which nobody writes more.
    """
    tokens = {r.key: found[0] for r in rows if (found := scarce.text(r)) and not found[1]}
    groups = {name: [r for r in some if r.key in tokens and r.status == "ok"] for name, some in scarce.groups(rows)}
    shown = {name: group for name, group in groups.items() if len({tokens[r.key] for r in group}) > 1}
    figure = _panels(shown, lambda r: r.case, lambda r: float(tokens[r.key]), "different tokens of each skill")
    for axes in figure.axes if figure else ():
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def _panels(
    shown: Mapping[str, Sequence[Row]], same: Callable[[Row], str], at: Callable[[Row], float], label: str
) -> Figure | None:
    """A line for each method in each panel, a point for all rows of the `same` thing; None without panels."""
    if not shown:
        return None
    figure, panels = _grid(len(shown))
    for axes, (name, group) in zip(panels, shown.items(), strict=True):
        axes.set_title(name, size=_SIZE, color=INK, loc="left")
        for method, (x, y) in points(group, same, at).items():
            mark: dict[str, Any] = {"markersize": 4.0, "linewidth": 1.6 if method in COLOURS else 0.8}
            axes.plot(x, y, _line(method), marker="o", color=COLOURS.get(method, FAINT), label=_legend(method), **mark)
        axes.set_xlabel(label, color=FAINT, size=_SIZE)
        axes.set_ylabel("worst skill, " + _UNITS.get(group[0].metric, group[0].metric), color=FAINT, size=_SIZE)
        if group[0].metric != "accuracy":
            axes.invert_yaxis()
    _key(figure, panels)
    return figure


def points(group: Sequence[Row], same: Callable[[Row], str], at: Callable[[Row], float]) -> dict[str, Curve]:
    """Method -> (place, worst skill), in order of place; means over seeds of what is the `same`.

    A line has no point where a run diverged.
    """
    found: dict[str, Curve] = {}
    for method, some in by(group, "method"):
        if method in ("anchor", "placebo"):
            continue  # the first is every case's floor, the second is far below it: both would squeeze the rest
        parts: dict[str, list[tuple[float, float]]] = {}
        for row in some:
            if (score := judged(row)) is not None:
                parts.setdefault(same(row), []).append((at(row), score))
        places = sorted(
            (mean(x for x, _ in part), y) for part in parts.values() if math.isfinite(y := mean(y for _, y in part))
        )
        found[method] = ([x for x, _ in places], [y for _, y in places])
    return found


def healing(group: Sequence[Row]) -> Figure | None:
    """The worst skill on validation data against tokens read, of every distilled method of one case."""
    curves = [(r, curve) for r in sorted(group, key=lambda r: r.key) if (curve := healing_curve(r))]
    if not curves:
        return None
    figure = Figure(figsize=(6.4, 2.4), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    seen: set[str] = set()
    for row, (tokens, worst) in curves:
        shade, kept = COLOURS.get(row.method, FAINT), row.extra.get("best_step")
        label = None if row.method in seen else name_of(row.method)
        seen.add(row.method)
        axes.plot(tokens, worst, _line(row.method), color=shade, linewidth=1.6, label=label)
        at = [i for i, point in enumerate(row.extra["curve"]) if point["step"] == kept]
        ring: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": PAPER, "markersize": 6}
        axes.plot([tokens[i] for i in at], [worst[i] for i in at], color=shade, **ring)
    accuracy = group[0].metric == "accuracy"
    axes.set_xlabel("thousand tokens read", color=FAINT, size=_SIZE)
    what = "accuracy, worst skill" if accuracy else "bits per byte over\nowner, worst skill"
    axes.set_ylabel(what, color=FAINT, size=_SIZE)
    if not accuracy:
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), axes.get_ylim()[1])
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    _key(figure, [axes])
    return figure


def healing_curve(row: Row) -> Curve | None:
    """(thousand tokens, worst skill) of a distilled method's run; None for any other row."""
    points: list[Mapping[str, Any]] = row.extra.get("curve") or []
    if row.method == "expert" or len(points) < 2 or not row.steps or "worst" not in points[0]:  # noqa: PLR2004
        return None
    each = row.tokens / row.steps
    return [p.get("tokens", p["step"] * each) / 1e3 for p in points], [
        math.nan if (w := p["worst"]) is None else w for p in points
    ]


def training(group: Sequence[Row]) -> Figure | None:
    """Loss and accuracy of an expert's training from scratch, every seed a line; step_val_acc_99 is marked."""
    runs = [r for r in sorted(group, key=lambda r: r.key) if r.method == "expert" and r.extra.get("curve")]
    if not runs:
        return None
    figure = Figure(figsize=(6.4, 2.1), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (kind, title) in zip(panels, (("loss", "loss, nats"), ("acc", "accuracy")), strict=True):
        plain(axes)
        for i, row in enumerate(runs):
            steps = [p["step"] for p in row.extra["curve"]]
            for part, shade in (("train", COLOURS["scratch_distill"]), ("val", COLOURS["fold_heal"])):
                values = [p[f"{part}_{kind}"] for p in row.extra["curve"]]
                axes.plot(steps, values, color=shade, linewidth=1.4, label=_PARTS[part] if i == 0 else None)
            if (at := reached(row)) is not None:
                axes.axvline(at, color=FAINT, linewidth=0.9, dashes=(3, 3), zorder=0)
        axes.set_xlabel("updates", color=FAINT, size=_SIZE)
        axes.set_ylabel(title, color=FAINT, size=_SIZE)
    marks = [at for row in runs if (at := reached(row)) is not None]
    if marks:
        panels[1].text(marks[-1], 1.03, "step_val_acc_99", transform=panels[1].get_xaxis_transform(), ha="center",
                       color=FAINT, size=_SIZE - 0.5)  # fmt: skip
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")  # powers of ten as text want fonts that may be missing
    panels[0].yaxis.set_minor_formatter("")
    _key(figure, [panels[0]])
    return figure


_PARTS = {"train": "training pairs", "val": "validation pairs"}


def reached(row: Row) -> int | None:
    """step_val_acc_99, unless it is only the number of updates after which training gave up."""
    step: int | None = row.extra.get("step_val_acc_99")
    gave_up = step == row.steps and row.extra.get("final_val_acc", 0.0) <= 0.99  # noqa: PLR2004  the seed's threshold
    return None if gave_up else step


def _cell(axes: Axes, x: int, y: int, found: tuple[float, float] | None) -> None:
    """One run; hatched where the method cannot do the case."""
    box: dict[str, Any] = {"xy": (x + 0.03, y + 0.06), "width": 0.94, "height": 0.88, "linewidth": 0}
    if found is None:
        axes.add_patch(Rectangle(**box, facecolor="none", edgecolor=FAINT, hatch="////", alpha=0.6))
        return
    score, shade = found
    mixed = tuple(a + (b - a) * shade for a, b in zip(_PALE, _DEEP, strict=True))
    axes.add_patch(Rectangle(**box, facecolor=mixed))
    ink = _WHITE if shade > 0.5 else _BLACK  # noqa: PLR2004
    said = board.number(score, 2)
    size = _SIZE - (2.0 if said == board.DIVERGED else 0.5)
    axes.text(x + 0.5, y + 0.52, said, ha="center", va="center", color=ink, size=size)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """Panels, three in a row."""
    across = min(count, 3)
    down = -(-count // across)
    figure = Figure(figsize=(max(6.4, 3.2 * across), 2.5 * down + 0.4), layout="constrained")
    every = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for axes in every[:count]:
        plain(axes)
    for axes in every[count:]:
        axes.set_visible(False)
    return figure, every[:count]


def _line(method: str) -> str:
    return "--" if method in DASHED else "-"


def _legend(method: str) -> str:
    return name_of(method) if method in COLOURS else "others"


def _key(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend above all panels."""
    found = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [*_PARTS.values(), *map(name_of, known())]
    lines = {n: found[n] for n in sorted(found, key=lambda n: (order.index(n) if n in order else len(order), n))}
    across = min(len(lines), int(figure.get_figwidth() // 3))  # the longest name takes three inches
    figure.set_figheight(figure.get_figheight() + 0.16 * (-(-len(lines) // across) - 1))
    figure.legend(
        lines.values(), lines.keys(), loc="outside upper left", ncols=across, frameon=False,
        labelcolor=INK, fontsize=_SIZE, handlelength=2.4,
    )  # fmt: skip
