"""The cells of one suite (case × seed × method) in one folder: which have no row, who is at which, one row for each."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polymerge import threads
from polymerge.bench import methods as table
from polymerge.bench.locks import held
from polymerge.bench.machine import code, commit, describe, peak, reset_peak, versions, without_folders
from polymerge.bench.methods import Bed, Case, Outcome
from polymerge.bench.rows import Key, Row, Store, summarise
from polymerge.bench.suites import Make, Suite
from polymerge.clock import Clock
from polymerge.errors import PolymergeError, PreflightError
from polymerge.progress import Progress


def claim(out: Path, suite: str, profile: str, case: str, seed: int, method: str = "") -> Path:
    """The lock of a case and seed, or of one method on them."""
    return out / ".claims" / hashlib.sha256(f"{suite} {profile} {case} {seed} {method}".encode()).hexdigest()[:16]


class Cells:
    """The cells of one suite in one folder."""

    def __init__(
        self,
        suite: str,
        profile: str,
        store: Store,
        wanted: Sequence[str],
        seeds: int,
        device: str,
        progress: Progress,
        out: Path,
        parent: int | None = None,
    ) -> None:
        self.suite, self.profile, self.store, self.wanted = suite, profile, store, wanted
        self.seeds, self.device, self.progress, self.out = seeds, device, progress, out
        self.parent = parent
        self.groups: list[tuple[Case, int]] = []
        self.missing = 0
        self.failures: dict[Key, Exception] = {}
        self.about: dict[str, Any] = {"device": describe(device), "commit": commit(), "versions": versions()}
        self.code = f"{code()}-{device}"

    def run(self, cases: Sequence[Case], suite: Suite) -> None:
        """Every cell without a row, case by case: experts are loaded and folded once. Then what others are still at."""
        self.groups = groups = [(case, seed) for seed in range(self.seeds) for case in cases]
        self.missing = self._missing()
        self.progress.stage(self.suite, self.missing)
        make = suite.make
        with threads.fitting(0):  # small models: more threads only wait, more workers don't
            suite.prepare(cases, self.seeds, self.device, lambda note: self.progress.advance(note, 0))
            for case, seed in groups:
                with held(self._claim(case, seed), wait=False) as mine:
                    if mine:
                        self._work(case, seed, make)
            for case, seed in groups:  # helping from the other end
                self._work(case, seed, make, backwards=True)
            for case, seed in groups:  # what a process that died had begun
                self._work(case, seed, make, wait=True)
        if self.failures:
            (_, _, case_name, seed, method), error = next(iter(self.failures.items()))
            raise PolymergeError(
                f"bench: {len(self.failures)} of the cells have no row;"
                f" the first: {case_name} seed {seed} {method}: {type(error).__name__}: {error}"
            ) from error

    def _claim(self, case: Case, seed: int, method: str = "") -> Path:
        return claim(self.out, self.suite, self.profile, case.name, seed, method)

    def _work(self, case: Case, seed: int, make: Make, *, backwards: bool = False, wait: bool = False) -> None:
        """Every method of a case that has no row and nobody else at it."""
        if self.parent is not None and os.getppid() != self.parent:
            raise SystemExit
        left = self._left(case, seed)
        shared = self.out / ".work" / self.code / self._claim(case, seed).name
        with TemporaryDirectory(prefix="polymerge-bench-") as own:
            bed: Bed | PreflightError | None = None
            for method in reversed(left) if backwards else left:
                with held(self._claim(case, seed, method), wait=wait) as mine:
                    if mine and method in self._left(case, seed):
                        bed = bed or self._bed(case, seed, make, Path(own), shared)
                        self._cell(case, seed, method, bed)
        if shared.exists() and not self._left(case, seed):
            self._sweep(case, seed, shared)

    def _sweep(self, case: Case, seed: int, shared: Path) -> None:
        """Delete what the methods of a case share, unless a process is at one, asked for by this run or not."""
        with ExitStack() as locks:  # nobody can begin one meanwhile
            claims = (self._claim(case, seed, method) for method in table.known())
            if all(locks.enter_context(held(claim, wait=False)) for claim in claims):
                shutil.rmtree(shared, ignore_errors=True)

    def _missing(self) -> int:
        """Cells without a row."""
        done = self.store.keys()
        return sum(
            (self.suite, self.profile, case.name, seed, m) not in done
            for case, seed in self.groups
            for m in self._methods(case)
        )

    def _finished(self, note: str) -> None:
        """Tell how many rows there are more, those of other processes included: the time left is that of all."""
        before, self.missing = self.missing, self._missing()
        self.progress.advance(note, before - self.missing)

    def _left(self, case: Case, seed: int) -> list[str]:
        """Methods of a case that have no row yet, and did not fail here."""
        done = self.store.keys() | self.failures.keys()
        return [m for m in self._methods(case) if (self.suite, self.profile, case.name, seed, m) not in done]

    def _methods(self, case: Case) -> list[str]:
        """What makes sense for a case: a baseline has its one expert, other cases everything else."""
        return [m for m in self.wanted if (m in case.methods if case.methods else m != "expert")]

    def _bed(self, case: Case, seed: int, make: Make, own: Path, shared: Path) -> Bed | PreflightError:
        """The case's experts, or why there are none."""

        def tell(note: str) -> None:
            self.progress.advance(f"{case.name} {note}", 0)

        try:
            return make(case, seed, self.device, own, shared, tell)
        except PreflightError as error:
            return error

    def _cell(self, case: Case, seed: int, method: str, bed: Bed | PreflightError) -> None:
        """One method's row; one that fails by a bug has none, and does not cost the others theirs."""
        if isinstance(bed, PreflightError):
            self.store.append(self._row(case, seed, method, status="cannot", reason=without_folders(str(bed))))
            self._finished(case.name)
            return
        facts = {
            "metric": bed.metric, "owners": bed.owners, "anchor": bed.anchor_scores, "budget": bed.budget,
            "expert_parameters": bed.expert_parameters, "setting": bed.setting,
        }  # fmt: skip
        self.progress.advance(f"{case.name} {method}", 0)
        clock = Clock()
        reset_peak(self.device)
        bed.shared.begin()
        try:
            with clock("run"):
                outcome = table.run(bed, method)
        except PreflightError as error:
            row = self._row(case, seed, method, status="cannot", reason=without_folders(str(error)), **facts)
        except Exception as error:  # noqa: BLE001  one method's bug must not cost the other rows
            self.failures[self.suite, self.profile, case.name, seed, method] = error
            return
        else:
            row = self._row(case, seed, method, **facts, **self._figures(bed, outcome, clock))
        self.store.append(row)
        self._finished(f"{case.name} {method}")

    def _figures(self, bed: Bed, outcome: Outcome, clock: Clock) -> dict[str, Any]:
        return {
            **{k: getattr(outcome, k) for k in ("scores", "parameters", "size", "tokens", "steps", "extra")},
            "flops": None if outcome.flops is None else outcome.flops + outcome.reused_flops,
            "notes": without_folders(outcome.notes),
            **summarise(outcome.scores, bed.owners, bed.anchor_scores, bed.metric),
            "seconds": clock.seconds["run"] - bed.shared.spent[0] + outcome.reused[0],
            "cpu_seconds": clock.cpu_seconds["run"] - bed.shared.spent[1] + outcome.reused[1],
            "peak_bytes": max(peak(self.device), bed.shared.peak_bytes, outcome.peak_bytes),
        }

    def _row(self, case: Case, seed: int, method: str, **facts: Any) -> Row:
        again = f"polymerge bench {self.suite} --profile {self.profile} --case {case.name} --methods {method}"
        command = f"{again} --seeds {seed + 1} --out {self.out.name}"
        return Row(self.suite, self.profile, case.name, seed, method, command=command, **self.about, **facts)
