"""What preflight tells: findings by kind, and what the merge will need."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from polymerge.report.terminal import duration, size

Level = Literal["exact", "approximate", "warning"]
LEVELS: tuple[tuple[Level, str], ...] = (
    ("warning", "look at this first"),
    ("approximate", "approximated, to be absorbed by regression, refinement and healing"),
    ("exact", "has an exact counterpart"),
)
SHOWN = 0.01
"""Share of the time from which on a stage is named."""
HOUR = 3600.0
"""A merge that takes longer is told with what a lean fold would take, where that is less than half of it."""


@dataclass(frozen=True)
class Finding:
    """`subject` is "expert: part"; `text` says what happens to it, and what that is known to cost."""

    level: Level
    subject: str
    text: str


@dataclass(frozen=True)
class Report:
    """All findings, and estimates of what the merge needs (formulas: `cost.py`).

    parameters: of the result at most; None where it is not known. memory_bytes: peak. disk_bytes: of the
    output folder. stages: seconds of each stage on this machine; these and `lean_seconds` differ from run to run.
    sources: what each expert is, in a line. lean_seconds: with `fold: lean`, where that is another thing.
    """

    findings: tuple[Finding, ...]
    parameters: int | None
    memory_bytes: int
    disk_bytes: int
    stages: dict[str, float]
    sources: dict[str, str] = field(default_factory=dict)
    lean_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(self.stages.values())

    def of(self, level: Level) -> tuple[Finding, ...]:
        """The findings of one kind, in order."""
        return tuple(f for f in self.findings if f.level == level)

    def summary(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"findings": [asdict(f) for f in self.findings], "seconds": self.seconds}

    def text(self) -> str:
        """Lines for a terminal."""
        lines = ["sources", *_aligned(self.sources.items())]
        for level, title in LEVELS:
            found = self.of(level)
            if found:
                lines += ["", title, *_aligned((f.subject, f.text) for f in found)]
        return "\n".join([*lines, "", "needs (estimates)", *_aligned(needs(self.summary()).items())])

    def __str__(self) -> str:
        return self.text()


def needs(found: Mapping[str, Any]) -> dict[str, str]:
    """What a report's summary says of size, disk, memory and time; stages that take a hundredth of it by name."""
    parameters, stages, seconds = found["parameters"], found["stages"], found["seconds"]
    some = {stage: taken for stage, taken in stages.items() if taken > SHOWN * seconds}
    parts = ", ".join(f"{stage} {duration(taken)}" for stage, taken in some.items())
    told = {
        "result": "size not known" if parameters is None else f"at most {parameters:,} parameters",
        "disk": size(found["disk_bytes"]),
        "memory": f"about {size(found['memory_bytes'])}",
        "time": f"about {duration(seconds)} on this machine" + (f": {parts}" if len(some) > 1 else ""),
    }
    lean = found.get("lean_seconds")
    if lean is not None and seconds > HOUR and lean < seconds / 2:
        told["or"] = f"about {duration(lean)} with `fold: lean`, which loses more unless long healing follows"
    return told


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    pairs = list(rows)
    width = max((len(left) for left, _ in pairs), default=0)
    return [f"  {left:<{width}}  {right}" for left, right in pairs]
