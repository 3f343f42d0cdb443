"""What a merge tells its user: a table in the terminal, a page with figures.

All of it is made from `MergeResult.summary()`, plain data that is also saved as JSON:

    skills        {name: {owner, union, fold, healed, experts: {expert: …}}}, bits per byte on test text
    parameters    of the result;  expert_parameters: {expert: …}
    shape         family, layers, width, heads, kv_heads, head_size, mlp
    seconds       wall time; stage_seconds, stage_cpu_seconds {stage: …};  peak_bytes
    heal_curve    [{step, tokens, validation: {skill: …}, …}];  knobs, knob_trials
    preflight     what was found before the merge
"""

from collections.abc import Mapping
from typing import Any

STAGES = ("union", "fold", "healed")


def final(row: Mapping[str, Any]) -> float | None:
    """Bits per byte of what was written: the last stage that a skill was measured at."""
    return next((row[s] for s in reversed(STAGES) if row.get(s) is not None), None)


def excess(row: Mapping[str, Any], stage: str | None = None) -> float | None:
    """Bits per byte above the skill's owner, at a stage or at the end; None where not measured."""
    value, owner = (final(row) if stage is None else row.get(stage)), row.get("owner")
    return None if value is None or owner is None else value - owner


def worst(skills: Mapping[str, Mapping[str, Any]], stage: str | None = None) -> str | None:
    """The skill that lost most: what every headline is about."""
    measured = {name: e for name, row in skills.items() if (e := excess(row, stage)) is not None}
    return max(measured, key=lambda name: measured[name]) if measured else None


def total_seconds(summary: Mapping[str, Any]) -> float | None:
    """Wall time of the whole merge."""
    total = summary.get("seconds")
    return None if total is None else float(total)


def stage_seconds(summary: Mapping[str, Any], key: str = "seconds") -> dict[str, float]:
    """Wall (or `cpu_seconds`) time by stage, without the total."""
    stages = summary.get(f"stage_{key}") or {}
    return {name: float(value) for name, value in stages.items() if name != "total"}


def in_rows(length: int | None) -> str:
    """How long the texts were at a time that figures are of."""
    return f" in rows of {length} tokens" if length else ""
