"""Figures of a merge, drawn by matplotlib: SVG inside the page, following its light or dark colours, or PNG.

No pyplot, so no window and no global state. Text stays text in the SVG. The colours of ink and paper are
placeholders that the page's style sheet gives a value; skills have the colours of Okabe and Ito (2008), which
colour-blind readers can tell apart.
"""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from polymerge.report import STAGES, excess

INK, FAINT, PAPER = "#101214", "#8a9099", "#fdfdfe"
"""Text; what is secondary; the background. Replaced by `currentColor` and variables in an SVG."""

SKILLS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "polymerge"}
_SIZE = 9.5


def colour(index: int) -> str:
    """The colour of the i-th skill."""
    return SKILLS[index % len(SKILLS)]


def per_skill(skills: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Bits per byte of each skill by every model: distance from the owner's line is what was lost."""
    lines = sum(len(_models(row)) for row in skills.values())
    figure, axes = _blank(7.2, 0.55 + 0.27 * lines + 0.42 * len(skills))
    y, span = 0.0, _span(skills)
    for index, (name, row) in enumerate(skills.items()):
        owner, shade = row["owner"], colour(index)
        models = _models(row)
        axes.text(span[0], y, name, color=shade, weight="bold", va="center", size=_SIZE + 1)
        axes.text(owner, y, f"owner {owner:.3f}", color=INK, ha="left", va="center", size=_SIZE)
        axes.plot([owner, owner], [y + 0.5, y + len(models) + 0.5], color=INK, linewidth=1.2, zorder=2)
        for label, value, ours in models:
            y += 1
            tone, thick = (shade, 3.2) if ours else (FAINT, 1.6)
            axes.hlines(y, *sorted((owner, value)), color=tone, linewidth=thick, zorder=1)
            fill = tone if ours else PAPER
            axes.plot([value], [y], "o", color=tone, markerfacecolor=fill, markersize=6.5, markeredgewidth=1.4)
            axes.text(span[0], y, label, color=INK if ours else FAINT, va="center", size=_SIZE)
            axes.text(max(value, owner) + 0.018 * (span[1] - span[0]), y, f"{value:.3f}", va="center",
                      color=INK if ours else FAINT, size=_SIZE)  # fmt: skip
        y += 1.55
    axes.set_ylim(y - 0.6, -0.7)
    axes.set_xlim(span[0], span[1])
    axes.set_yticks([])
    ticks = [t for t in axes.get_xticks() if t >= span[2] - 1e-9 and t <= span[1]]
    axes.set_xticks(ticks)
    axes.set_xlabel("bits per byte on test text (left is better)", color=FAINT, size=_SIZE)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(ticks[0] if ticks else span[2], span[1])
    return figure


def healing(curve: Sequence[Mapping[str, Any]], reference: Mapping[str, float] | None = None) -> Figure:
    """Validation bits per byte of each skill against tokens read, less `reference` (owners)."""
    figure, axes = _blank(7.2, 2.7)
    names = list(curve[0]["validation"])
    tokens = [point["tokens"] / 1000 for point in curve]
    base = reference or dict.fromkeys(names, 0.0)
    lines = {name: [point["validation"][name] - base[name] for point in curve] for name in names}
    for index, values in enumerate(lines.values()):
        axes.plot(tokens, values, "-o", color=colour(index), linewidth=1.8, markersize=3.5)
    if reference:
        axes.axhline(0, color=INK, linewidth=1)
        axes.text(0.995, 0.0, "owner", color=INK, size=_SIZE, va="bottom", ha="right",
                  transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set_ylim(-0.04 * axes.get_ylim()[1], axes.get_ylim()[1])
    for name, at in _apart({name: values[-1] for name, values in lines.items()}, axes):
        text = f"{name}  {lines[name][-1]:{'+.3f' if reference else '.3f'}}"
        _note(
            axes,
            text,
            (tokens[-1], at),
            (8.0, 0.0),
            color=colour(names.index(name)),
            va="center",
            weight="bold",
        )
    kept = [point for point in curve if point.get("best")]
    if kept:
        axes.axvline(kept[-1]["tokens"] / 1000, color=FAINT, linewidth=0.9, dashes=(3, 3), zorder=0)
        axes.text(kept[-1]["tokens"] / 1000, 1.02, "kept", transform=axes.get_xaxis_transform(), ha="center",
                  color=FAINT, size=_SIZE - 1)  # fmt: skip
    axes.set_xlim(0, tokens[-1] or 1)
    axes.set_xlabel("thousand tokens read", color=FAINT, size=_SIZE)
    axes.set_ylabel("bits per byte over owner" if reference else "bits per byte", color=FAINT, size=_SIZE)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    return figure


def story(summary: Mapping[str, Any]) -> Figure:
    """Union, fold, heal in one picture: what each skill has lost against its owner after every stage."""
    skills, experts = summary["skills"], summary["expert_parameters"]
    stages = [s for s in STAGES if any(row.get(s) is not None for row in skills.values())]
    figure, axes = _blank(8.0, 3.4)
    width = 0.62 / len(skills)
    for index, (name, row) in enumerate(skills.items()):
        other, shade = _other(row), colour(index)
        lost = [None if other is None else other - row["owner"], *(excess(row, stage) for stage in stages)]
        for x, value in enumerate(lost):
            if value is None:
                continue
            at = x + (index - (len(skills) - 1) / 2) * width
            axes.bar(at, value, 0.86 * width, facecolor=shade if x else PAPER, edgecolor=shade, linewidth=1.4)
            text = _signed(value) if x else f"{name}\n{_signed(value)}"
            _note(
                axes,
                text,
                (at, max(value, 0.0)),
                (0.0, 3.0),
                ha="center",
                va="bottom",
                color=shade,
                weight="bold",
            )
    captions = {
        "union": f"both experts whole and a gate\n{_millions(sum(experts.values()))}, no training",
        "fold": f"one plain {summary['shape']['family']}\n{_millions(summary['parameters'])}, closed form",
        "healed": f"the same {summary['shape']['family']}\nafter a short distillation",
    }
    titles = ["the other expert", *stages]
    for x, (title, caption) in enumerate(zip(titles, ["not merged", *(captions[s] for s in stages)], strict=True)):
        below = {"ha": "center", "va": "top", "xycoords": axes.get_xaxis_transform()}
        _note(axes, title, (float(x), 0.0), (0.0, -6.0), color=INK, size=_SIZE + 1, weight="bold", **below)
        _note(axes, caption, (float(x), 0.0), (0.0, -22.0), color=FAINT, size=_SIZE - 0.5, **below)
    axes.axhline(0, color=INK, linewidth=1.1)
    axes.set_xlim(-0.55, len(stages) + 0.55)
    axes.set_ylim(min(0, axes.get_ylim()[0]), 1.12 * axes.get_ylim()[1])
    axes.set_xticks([])
    axes.set_ylabel("bits per byte above the owner", color=FAINT, size=_SIZE)
    axes.spines["bottom"].set_visible(False)
    return figure


def svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element for a page; `label` is what a screen reader says."""
    import matplotlib as mpl

    with mpl.rc_context({**_SVG, "svg.hashsalt": f"polymerge {label}"}):
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([^;\"]*?)(\d[\d.]*px) [^;\"]*", r"font: \1\2 var(--sans)", text)
    for placeholder, value in ((INK, "currentColor"), (FAINT, "var(--faint)"), (PAPER, "var(--paper)")):
        text = text.replace(placeholder, value)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def png(figure: Figure, dots_per_inch: int = 160) -> bytes:
    """The figure on white as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white")
    return buffer.getvalue()


def _models(row: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    """(label, bits per byte, whether it is ours) of every model measured on a skill but its owner."""
    owner = row["owner"]
    others = [(f"{n} alone", v, False) for n, v in (row.get("experts") or {}).items() if v is not None and v != owner]
    return others + [(s, row[s], True) for s in STAGES if row.get(s) is not None]


def _other(row: Mapping[str, Any]) -> float | None:
    """The best that an expert which does not own the skill does on it."""
    others = [value for _, value, ours in _models(row) if not ours]
    return min(others) if others else None


def _span(skills: Mapping[str, Mapping[str, Any]]) -> tuple[float, float, float]:
    """Left end (with room for labels), right end (with room for figures), and the least value."""
    values = [v for row in skills.values() for _, v, _ in _models(row)] + [r["owner"] for r in skills.values()]
    low, high = min(values), max(values)
    room = max(high - low, 0.05)
    return low - 0.34 * room, high + 0.12 * room, low - 0.02 * room


def _apart(values: Mapping[str, float], axes: Axes, least: float = 0.09) -> list[tuple[str, float]]:
    """(name, height) of labels pushed up so that they do not overlap; `least` is a share of the axis."""
    gap = least * (axes.get_ylim()[1] - axes.get_ylim()[0])
    placed: list[tuple[str, float]] = []
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        placed.append((name, max(value, placed[-1][1] + gap) if placed else value))
    return placed


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """Text beside a point of the plot; offset in points."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **{"size": _SIZE, **look})


def _signed(value: float) -> str:
    """Two digits with a sign, but no minus before a zero."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"  # noqa: PLR2004


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """Axes in the house style: two faint spines, no background."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    axes.tick_params(colors=FAINT, labelsize=_SIZE - 0.5)
    axes.patch.set_alpha(0)
