"""What preflight tells: findings by kind, and what the merge will need."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["exact", "approximate", "warning"]
LEVELS: tuple[tuple[Level, str], ...] = (
    ("warning", "look at this first"),
    ("approximate", "approximated, to be absorbed by regression, refinement and healing"),
    ("exact", "has an exact counterpart"),
)


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
    output folder. seconds: wall time on this machine; the only number that differs from run to run. sources:
    what each expert is, in a line.
    """

    findings: tuple[Finding, ...]
    parameters: int | None
    memory_bytes: int
    disk_bytes: int
    seconds: float
    sources: dict[str, str] = field(default_factory=dict)

    def of(self, level: Level) -> tuple[Finding, ...]:
        """The findings of one kind, in order."""
        return tuple(f for f in self.findings if f.level == level)

    def summary(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"findings": [asdict(f) for f in self.findings]}

    def text(self) -> str:
        """Lines for a terminal."""
        lines = ["sources", *_aligned(self.sources.items())]
        for level, title in LEVELS:
            found = self.of(level)
            if found:
                lines += ["", title, *_aligned((f.subject, f.text) for f in found)]
        parameters = "not known" if self.parameters is None else f"at most {self.parameters:,} parameters"
        needs = {
            "result": parameters,
            "disk": size(self.disk_bytes),
            "memory": f"about {size(self.memory_bytes)}",
            "time": f"about {duration(self.seconds)} on this machine",
        }
        return "\n".join([*lines, "", "needs (estimates)", *_aligned(needs.items())])

    def __str__(self) -> str:
        return self.text()


def size(nbytes: int) -> str:
    """3.2 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """40 s, 3 min, 2.5 h."""
    if seconds < 90:  # noqa: PLR2004  seconds
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    pairs = list(rows)
    width = max((len(left) for left, _ in pairs), default=0)
    return [f"  {left:<{width}}  {right}" for left, right in pairs]
