"""The page of a finished merge: one HTML file that needs nothing else, readable in light and dark.

Made from `MergeResult.summary()` (see the package's docstring); what a summary does not hold is left out.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from polymerge import report
from polymerge.errors import OutputError
from polymerge.report.page import document, facts, joined, save, table
from polymerge.report.terminal import bits, duration, size


def read(path: Path | str) -> dict[str, Any]:
    """A saved summary. Raises OutputError when the file is not one."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: not a summary of a merge ({error}); expected its JSON") from error
    if not isinstance(data, dict) or not data.get("skills"):
        raise OutputError(f"{path}: not a summary of a merge: no `skills` in it; was it a dry run?")
    return data


def write(path: Path | str, summary: Mapping[str, Any]) -> None:
    """Write the page. Raises OutputError when the place cannot be written."""
    save(path, page(summary))


def page(summary: Mapping[str, Any]) -> str:
    """The page as text."""
    headline, lead = _headline(summary)
    sections = [
        ("Skills", _skills(summary)),
        ("Where each skill stands", _per_skill(summary)),
        ("Size", _size(summary)),
        ("Healing", _healing(summary)),
        ("Time and memory", _cost(summary)),
        ("Shapes and knobs of the fold", _knobs(summary)),
        ("What was found before the merge", _findings(summary)),
        ("Samples", _samples(summary)),
        ("Recipe", _pre(summary.get("recipe"))),
    ]
    foot = (
        f"Made by polymerge {summary.get('version', '')}. Bits per byte are measured on test text that no stage of "
        f"the merge read{report.in_rows(summary.get('length'))}; lower is better."
    )
    return document(headline, lead, f"{_facts(summary)}\n{joined(sections)}", foot)


def _headline(summary: Mapping[str, Any]) -> tuple[str, str]:
    """The result in a sentence about the worst skill, and what was merged into what."""
    skills = summary["skills"]
    name = report.worst(skills)
    experts, shape = list(summary.get("expert_parameters") or {}), summary.get("shape") or {}
    what = f"{' + '.join(experts)} in one {shape.get('family', 'model')}" if experts else "one model"
    lost = None if name is None else report.excess(skills[name])
    if name is None or lost is None:
        return f"{what}: no skill was measured", ""
    distance = (
        f"{lost:.3f} bits per byte from its owner" if lost >= 0 else f"{-lost:.3f} bits per byte better than its owner"
    )
    lead = ""
    if shape:
        lead = (
            f"{shape['layers']} layers, width {shape['width']}, {shape['heads']} heads of size "
            f"{shape['head_size']} ({shape['kv_heads']} KV), MLP {shape['mlp']}. "
            f"Method: {summary.get('method')}."
        )
    return f"{what}: the worst skill, {name}, is {distance}", lead


def _facts(summary: Mapping[str, Any]) -> str:
    """The four figures one looks for first."""
    experts = summary.get("expert_parameters") or {}
    cells = [(f"{summary['parameters'] / 1e6:,.2f} M", "parameters")]
    if experts:
        cells.append((f"{summary['parameters'] / max(experts.values()):.2f}x", "the largest expert"))
    total = report.total_seconds(summary)
    if total is not None:
        cells.append((duration(total), "wall time in all"))
    if summary.get("peak_bytes"):
        cells.append((size(summary["peak_bytes"]), "peak memory"))
    return facts(cells)


def _skills(summary: Mapping[str, Any]) -> str:
    skills = summary["skills"]
    stages = [s for s in report.STAGES if any(row.get(s) is not None for row in skills.values())]
    experts = list(next(iter(skills.values())).get("experts") or {})
    header = ["skill", *(f"{e} alone" for e in experts), *stages, "over owner"]
    loser, rows = report.worst(skills), []
    for name, row in skills.items():
        alone = [bits((row.get("experts") or {}).get(e)) for e in experts]
        rows.append([name, *alone, *(bits(row.get(s)) for s in stages), bits(report.excess(row), "+.3f")])
    marked = [name == loser for name in skills]
    return table(header, rows, marked) + (
        '<p class="note">Bits per byte. The worst skill is bold: it is what a merge is judged by. '
        "The owner of a skill is its own expert, unless another predicts its text better.</p>"
    )


def _per_skill(summary: Mapping[str, Any]) -> str:
    from polymerge.report import figures

    drawn = figures.svg(figures.per_skill(summary["skills"]), "bits per byte of each skill by model")
    return f"<figure>{drawn}</figure>"


def _healing(summary: Mapping[str, Any]) -> str:
    from polymerge.report import figures

    curve = summary.get("heal_curve") or []
    if len(curve) < 2:  # noqa: PLR2004  one point is no curve
        return ""
    drawn = figures.svg(
        figures.healing(curve, summary.get("heal_reference")), "bits per byte of each skill while healing"
    )
    note = "Measured on validation text, which also chose the state that is kept."
    return f'<figure>{drawn}</figure><p class="note">{note}</p>'


def _size(summary: Mapping[str, Any]) -> str:
    experts = summary.get("expert_parameters") or {}
    if not experts:
        return ""
    total = max(sum(experts.values()), summary["parameters"])
    rows = [(name, [(float(count), False)], f"{count:,}") for name, count in experts.items()]
    if len(experts) > 1:
        rows.append(("together", [(float(count), False) for count in experts.values()], f"{sum(experts.values()):,}"))
    rows.append(("result", [(float(summary["parameters"]), True)], f"{summary['parameters']:,}"))
    return _bars(rows, float(total)) + '<p class="note">Parameters.</p>'


def _cost(summary: Mapping[str, Any]) -> str:
    stages, cpu = report.stage_seconds(summary), report.stage_seconds(summary, "cpu_seconds")
    if not stages:
        return ""
    rows = [
        (name, [(value, True)], duration(value) + (f" ({duration(cpu[name])} CPU)" if name in cpu else ""))
        for name, value in stages.items()
    ]
    peak = summary.get("peak_bytes")
    memory = f" Peak memory {size(peak)}, models and Python included." if peak else ""
    return _bars(rows, max(stages.values())) + f'<p class="note">Wall time by stage.{memory}</p>'


def _knobs(summary: Mapping[str, Any]) -> str:
    trials = summary.get("knob_trials") or []
    chosen = {**(summary.get("shape") or {}), **(summary.get("knobs") or {})}
    if not trials:
        return ""
    rows = [_trial(trial, list(summary["skills"])) for trial in trials]
    header = list(dict.fromkeys(key for row in rows for key in row))
    marked = [all(trial.get(k) == v for k, v in chosen.items() if k in trial) for trial in trials]
    shown = table(header, [[row.get(key, "–") for key in header] for row in rows], marked)
    return shown + (
        '<p class="note">Shapes and knobs tried on held-out calibration text, before any training: what each '
        "skill lost, in bits per byte, and the worst of them. What was chosen is bold.</p>"
    )


def _trial(trial: Mapping[str, Any], skills: Sequence[str]) -> dict[str, str]:
    """A trial's cells by column; what each skill lost gets a column of its own."""
    cells: dict[str, str] = {}
    for key, value in trial.items():
        if key == "excess":
            cells |= {f"{name} lost": f"{lost:.3f}" for name, lost in zip(skills, value, strict=True)}
        elif key == "worst":
            cells[key] = f"{value:.3f}"
        else:
            cells[key.replace("_", " ")] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return cells


def _findings(summary: Mapping[str, Any]) -> str:
    found = (summary.get("preflight") or {}).get("findings", [])
    shown = [_finding(f) for level in ("warning", "approximate") for f in found if f["level"] == level]
    exact = [_finding(f) for f in found if f["level"] == "exact"]
    text = f'<ul class="findings">{"".join(shown)}</ul>' if shown else ""
    if exact:
        text += f"<details><summary>{len(exact)} carried over exactly</summary>"
        text += f'<ul class="findings">{"".join(exact)}</ul></details>'
    return text


def _finding(finding: Mapping[str, str]) -> str:
    level, subject = finding["level"], escape(finding["subject"])
    return f'<li class="{level}"><b>{subject}</b> <em>{level}</em><br>{escape(finding["text"])}</li>'


def _samples(summary: Mapping[str, Any]) -> str:
    samples = summary.get("samples") or {}
    return "".join(
        f'<p class="note">{escape(name)}</p><pre><b>{escape(s["prompt"])}</b>{escape(s["text"])}</pre>'
        for name, s in samples.items()
    )


def _pre(text: str | None) -> str:
    return f"<pre>{escape(text.rstrip())}</pre>" if text else ""


def _bars(rows: Sequence[tuple[str, list[tuple[float, bool]], str]], full: float) -> str:
    """Horizontal bars; a bar is of parts, each (length, whether it is ours)."""
    cells = []
    for name, parts, value in rows:
        track = "".join(
            f'<i{" class=ours" if ours else ""} style="width:{100 * length / full:.2f}%"></i>' for length, ours in parts
        )
        cells.append(
            f'<span>{escape(name)}</span><span class="track">{track}</span><span class="value">{escape(value)}</span>'
        )
    return f'<div class="bars">{"".join(cells)}</div>'
