"""What a merge did, stage by stage: what Python is given, and what tables, pages and cards are made of."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymerge import preflight
from polymerge.features import Features

_NOT_PLAIN = ("out", "report", "cpu_seconds", "features")


@dataclass
class MergeResult:
    """What a merge did; losses in bits per byte on test text, in rows of `length` tokens. `summary()` is JSON-ready.

    `features`: of each skill's owner, for healing later.
    """

    out: Path | None
    method: str
    report: preflight.Report
    parameters: int
    expert_parameters: dict[str, int]
    length: int
    shape: dict[str, Any] = field(default_factory=dict)
    skills: dict[str, dict[str, Any]] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, float] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    knob_trials: list[dict[str, Any]] = field(default_factory=list)
    heal_curve: list[dict[str, Any]] = field(default_factory=list)
    heal_reference: dict[str, float] = field(default_factory=dict)
    features: dict[str, Features] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def worst_skill(self) -> tuple[str, float] | None:
        """The skill that lost most against its owner, and how much; None where the result was not measured."""
        last = "healed" if self.heal_curve else "union" if self.method == "union" else "fold"
        if any(row[last] is None for row in self.skills.values()):
            return None
        losses = {name: row[last] - row["owner"] for name, row in self.skills.items()}
        return max(losses.items(), key=lambda item: (math.isnan(item[1]), item[1])) if losses else None

    @property
    def left_out(self) -> list[str]:
        """Experts that are not in the result: others predict their texts better."""
        return [name for name in self.expert_parameters if self.owners and name not in self.owners.values()]

    def summary(self) -> dict[str, Any]:
        """Plain data, as in summary.json."""
        plain = {key: value for key, value in vars(self).items() if key not in _NOT_PLAIN}
        worst = self.worst_skill
        return {
            **plain,
            "seconds": self.seconds.get("total"),
            "stage_seconds": self.seconds,
            "stage_cpu_seconds": self.cpu_seconds,
            "out": str(self.out) if self.out else None,
            "left_out": self.left_out,
            "worst_skill": {"name": worst[0], "excess": worst[1]} if worst else None,
            "preflight": self.report.summary(),
        }
