"""The benchmark's results: one JSON line per run of one method on one case; every table is made from these alone.

A line is appended with one write under a lock and synced, so that a kill leaves at most one half-written line, at the
end: it is not read, and the next append cuts it off. A row's key (suite, profile, case, seed, method) is what a
resumed benchmark skips; of two rows with one key the later counts.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from polymerge.errors import OutputError

FILE = "rows.jsonl"
Key = tuple[str, str, str, int, str]


@dataclass(frozen=True)
class Row:
    """One method on one case with one seed.

    Attributes:
        suite: modular or text.
        profile: quick, medium, full or large.
        case: name of the case; its protocol, tasks and experts are in `setting`.
        seed: of the experts, their data split and the method.
        method: a method's name.
        status: "ok", or "cannot" with the `reason`.
        metric: "accuracy" (more is better) or "bits per byte" (less is better), on test data.
        scores: skill -> metric, None where that is no number; `owners` and `anchor` likewise for each skill's owner
            and for the anchor alone.
        worst: the score of the skill that lost most against its owner; `worst_skill` names it.
        gap_closed: (merged - anchor) / (owner - anchor), the least over the skills that the anchor lacks.
        size: shape of the result; `budget` what was allowed, such as "sum" or "1.5x".
        parameters: of the result; `expert_parameters` of each expert.
        tokens: read by gradient training on top of calibration.
        steps: of that training.
        flops: of its matrix products, every learning rate and setting tried counted: by formula where a model is
            distilled (`training_flops`), counted while it ran elsewhere (`flops.Products`); None where not known.
        seconds: wall; `cpu_seconds` of this process and its children; `peak_bytes` resident (GPU: allocated) during
            the run.
        command: runs this row again.
        extra: curves, knobs and what else a report may show.
    """

    suite: str
    profile: str
    case: str
    seed: int
    method: str
    status: Literal["ok", "cannot"] = "ok"
    reason: str | None = None
    metric: str = "accuracy"
    scores: dict[str, float | None] = field(default_factory=dict)
    owners: dict[str, float] = field(default_factory=dict)
    anchor: dict[str, float] = field(default_factory=dict)
    worst: float | None = None
    worst_skill: str | None = None
    gap_closed: float | None = None
    budget: str = ""
    size: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    expert_parameters: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    flops: int | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    device: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    notes: str = ""
    setting: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What makes a row the same row."""
        return (self.suite, self.profile, self.case, self.seed, self.method)


def summarise(
    scores: Mapping[str, float], owners: Mapping[str, float], anchor: Mapping[str, float], metric: str
) -> dict[str, Any]:
    """`worst`, `worst_skill` and `gap_closed` of a result (see `Row`)."""
    if not scores:
        return {}
    up = 1 if metric == "accuracy" else -1
    name = min(scores, key=lambda skill: (-ranked(up * (owners[skill] - scores[skill])), skill))
    gaps = [
        (scores[skill] - anchor[skill]) / (owners[skill] - anchor[skill])
        for skill in scores
        if skill in anchor and up * (owners[skill] - anchor[skill]) > 1e-3  # noqa: PLR2004  below: the anchor's own
    ]
    gap = min(gaps, key=lambda gap: -ranked(-gap), default=None)
    return {"worst": scores[name], "worst_skill": name, "gap_closed": gap}


def ranked(loss: float) -> float:
    """A loss to sort by: what is no number is worse than any."""
    return math.inf if math.isnan(loss) else loss


def excess(row: Row) -> float | None:
    """What the worst skill lost against its owner, in the metric's units; None where that is not known."""
    if row.worst is None or row.worst_skill not in row.owners:
        return None
    loss = row.worst - row.owners[row.worst_skill]
    return -loss if row.metric == "accuracy" else loss


def judged(row: Row) -> float | None:
    """What methods are ranked by: the lowest accuracy, or the worst skill's bits per byte over the owner's.

    Bits per byte of two skills can't be compared: some texts are easier than others. A score that is no number is the
    worst there can be: a method is not to gain by a run that diverged. None where the method could not be run.
    """
    if row.status != "ok":
        return None
    if row.worst is None:
        return -math.inf if row.metric == "accuracy" else math.inf
    if row.metric == "accuracy":
        return min((score for score in row.scores.values() if score is not None), default=row.worst)
    over = excess(row)
    return row.worst if over is None else over


def training_flops(parameters: int, tokens: int, *, runs: int = 1, teachers: Iterable[tuple[int, int]] = ()) -> int:
    """Floating point operations of gradient training, matrix products only: 6·N·D + Σ 2·M·T (Kaplan et al. 2020).

    A product of weights costs 2 operations a weight and token forwards and 4 backwards. Attention's products with
    keys and values are left out; embeddings count as if they were multiplied: both are small shares of these models.

    Args:
        parameters: N, of what is trained.
        tokens: D, that one run reads.
        runs: how many were made, such as one for each learning rate.
        teachers: (parameters M, tokens T that it reads over all runs) of each model that is only read.
    """
    return runs * 6 * parameters * tokens + sum(2 * size * read for size, read in teachers)


class Store:
    """The rows of a folder. Raises OutputError where it cannot be written."""

    def __init__(self, folder: Path | str, file: str = FILE) -> None:
        self.path = Path(folder) / file

    def read(self) -> list[Row]:
        """All whole rows, the last one of each key, sorted by key."""
        return [found for _, found in sorted({row.key: row for row in self._parsed()}.items())]

    def keys(self) -> frozenset[Key]:
        """Keys of the finished rows."""
        return frozenset(row.key for row in self._parsed())

    def append(self, row: Row) -> None:
        """Add one row, whole or not at all."""
        line = json.dumps(_finite(asdict(row)), sort_keys=True, allow_nan=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                _cut_half_line(file.fileno())
                os.write(file.fileno(), line)
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}); choose another folder") from error

    def _parsed(self) -> list[Row]:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read ({error.strerror})") from error
        return [parse(line, f"{self.path}:{i}") for i, line in enumerate(data.split(b"\n")[:-1], 1) if line.strip()]


def gather(places: Sequence[Path | str]) -> list[Row]:
    """Rows of several files, and of all `*.jsonl` files of folders; of two rows with one key the later counts.

    A file of a folder whose first line is no row, such as another experiment's, is passed over. Raises OutputError.
    """
    found: dict[Key, Row] = {}
    for place in map(Path, places):
        if not place.exists():
            raise OutputError(f"{place}: does not exist; expected a folder of a benchmark, or a file of its rows")
        for path in sorted(place.glob("*.jsonl")) if place.is_dir() else [place]:
            if place.is_dir() and not _holds_rows(path):
                continue
            found |= {row.key: row for row in Store(path.parent, path.name).read()}
    return [row for _, row in sorted(found.items())]


def _holds_rows(path: Path) -> bool:
    """Whether a file begins as a file of rows does."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline() or b"null")
    except (OSError, ValueError):
        return path.name == FILE  # damage there is told, not passed over
    return isinstance(first, dict) and {"suite", "case", "method"} <= first.keys()


def parse(line: bytes, where: str) -> Row:
    """A row from its line. Raises OutputError: a whole line that is no row is damage that no kill explains."""
    known = [f.name for f in fields(Row)]
    try:
        data = json.loads(line)
        return Row(**{key: value for key, value in data.items() if key in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise OutputError(f"{where}: not a row of results ({error}); delete the line to run it again") from error


def select(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """The rows whose fields have the given values."""
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


def _cut_half_line(file: int) -> None:
    """Truncate after the last line break: what follows it was being written when the process died."""
    end = size = os.fstat(file).st_size
    while end and os.pread(file, 1, end - 1) != b"\n":
        block = os.pread(file, min(4096, end), end - min(4096, end))
        at = block.rfind(b"\n")
        end = 0 if at < 0 and end <= len(block) else end - len(block) + at + 1
    if end != size:
        os.ftruncate(file, end)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
