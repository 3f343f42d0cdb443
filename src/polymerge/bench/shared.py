"""Folds that several methods of a case share: made by the first process that wants one, kept until the case is done."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from polymerge.bench.answers import Weights
from polymerge.bench.flops import Products
from polymerge.bench.locks import held
from polymerge.bench.methods import Outcome, gathered
from polymerge.calibrate.calibration import Calibration
from polymerge.methods import fold as folding
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec


class Kept:
    """A model in a folder, and what its making gave and took, beside it.

    `make`: writes the folder, returns the outcome. A run that was killed goes on with what was whole.
    """

    def __init__(self, folder: Path, make: Callable[[Path], Outcome]) -> None:
        self.folder, self.make = folder, make

    def __call__(self) -> tuple[Path, Outcome]:
        """The folder, and the outcome, whose `reused` is what others spent on it, in (wall, CPU) seconds."""
        note, came = self.folder.with_suffix(".json"), time.perf_counter()
        with held(self.folder.with_suffix(".lock")):
            wall, cpu = time.perf_counter(), time.process_time()
            if note.exists():
                found = json.loads(note.read_text(encoding="utf-8"))
                took, spent = found["reused"]
                found["reused"] = (took - (wall - came), spent)  # waiting is on the caller's clock already
                return self.folder, Outcome(**found)
            shutil.rmtree(self.folder, ignore_errors=True)
            outcome = self.make(self.folder)
            took, spent = time.perf_counter() - wall, time.process_time() - cpu
            half = note.with_suffix(".part")
            half.write_text(json.dumps(asdict(replace(outcome, reused=(took, spent)))), encoding="utf-8")
            half.rename(note)
            return self.folder, outcome


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
