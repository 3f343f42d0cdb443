"""Folds that several methods of a case share: made by the first process that wants one, kept until the case is done."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from polymerge.bench.answers import Weights
from polymerge.bench.flops import Products
from polymerge.bench.locks import held
from polymerge.bench.machine import peak, reset_peak
from polymerge.bench.methods import Outcome, gathered
from polymerge.calibrate.calibration import Calibration
from polymerge.clock import cpu_seconds
from polymerge.methods import fold as folding
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec


class Shared:
    """Models in a folder, and beside each what its making gave and took. A run that was killed goes on with them.

    `spent`: the (wall, CPU) seconds since `begin` in which this process made them or waited for them. No method is
    charged with these; those that a model belongs to add `Outcome.reused`, the seconds of its whole making, and have
    its peak of memory. `peak_bytes`: this process's since `begin`, before it made any.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device, self.spent, self.peak_bytes = folder, device, (0.0, 0.0), 0

    def begin(self) -> None:
        """Count anew."""
        self.spent, self.peak_bytes = (0.0, 0.0), 0

    def model(self, name: str, make: Callable[[Path], Outcome]) -> tuple[Path, Outcome]:
        """The folder of a model and its outcome; `make` writes the folder, if nobody has. Not to be nested."""
        folder = self.folder / name
        note, wall, cpu = folder.with_suffix(".json"), time.perf_counter(), cpu_seconds()
        with held(folder.with_suffix(".lock")):
            if not note.exists():
                self.peak_bytes = max(self.peak_bytes, peak(self.device))
                reset_peak(self.device)
                _make(folder, make, note, self.device)
                reset_peak(self.device)
            found = json.loads(note.read_text(encoding="utf-8"))
        found["reused"] = tuple(found["reused"])
        before = self.spent
        self.spent = (before[0] + time.perf_counter() - wall, before[1] + cpu_seconds() - cpu)
        return folder, Outcome(**found)


def _make(folder: Path, make: Callable[[Path], Outcome], note: Path, device: str) -> None:
    """The folder, then the note, which says that it is whole."""
    shutil.rmtree(folder, ignore_errors=True)
    wall, cpu = time.perf_counter(), cpu_seconds()
    outcome = make(folder)
    outcome.reused = (time.perf_counter() - wall, cpu_seconds() - cpu)
    outcome.peak_bytes = peak(device)
    half = note.with_suffix(".part")
    half.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    half.rename(note)


def folded(
    experts: Sequence[Source],
    family: Family,
    shapes: Sequence[Spec],
    texts: Calibration,
    settings: folding.Settings,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[folding.Folded, Weights, int]:
    """A fold in memory: what it did, its weights, the operations of its products."""
    parts: list[tuple[int | None, dict[str, Tensor]]] = []
    with Products() as products:
        done = folding.fold(
            experts, family, shapes, texts, settings, seed=seed, progress=progress,
            emit=lambda _: lambda layer, some: parts.append((layer, some)),
        )  # fmt: skip
    return done, gathered(parts), products.flops
