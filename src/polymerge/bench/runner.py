"""Runs the cells of a suite (case × seed × method) that a folder has no row of yet, and writes one row for each.

run("modular", "quick", "out/bench")      # kill it, run it again: it goes on with the next cell
report("out/bench")                       # LEADERBOARD.md and report.html, from the rows alone
"""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polymerge import threads
from polymerge.bench import board
from polymerge.bench import methods as table
from polymerge.bench.locks import held
from polymerge.bench.machine import code, commit, describe, peak, reset_peak, versions, without_folders
from polymerge.bench.methods import Bed, Case, Outcome
from polymerge.bench.rows import Key, Row, Store, gather, summarise
from polymerge.clock import Clock
from polymerge.errors import OutputError, PolymergeError, PreflightError
from polymerge.progress import Progress, Quiet

SUITES = ("modular", "text")
PROFILES = ("quick", "medium", "full")
MOST_WORKERS = 4
Make = Callable[[Case, int, str, Path, Path, Callable[[str], None]], Bed]
"""(case, seed, device, own scratch folder, folder shared with other processes, listener) -> bed."""


@dataclass(frozen=True)
class Suite:
    """A suite's cases, what makes the bed of one, what one lacks here (empty: nothing), and what a GPU does first.

    `prepare`: (cases, seeds, device, listener).
    """

    cases: list[Case]
    make: Make
    lack: Callable[[Case], str] = lambda _: ""
    prepare: Callable[[Sequence[Case], int, str, Callable[[str], None]], None] = lambda *_: None


def run(
    suite: str,
    profile: str,
    out: Path | str,
    methods: Sequence[str] | None = None,
    seeds: int = 1,
    device: str = "auto",
    progress: Progress | None = None,
    *,
    cases: Sequence[str] | None = None,
    workers: int = 1,
    texts: Path | str | None = None,
    parent: int | None = None,
) -> list[Row]:
    """Fill a folder with the rows of a suite; returns all rows of the folder.

    Args:
        suite: "modular", "text" or "all".
        profile: "quick", "medium" (text alone) or "full".
        out: folder of `rows.jsonl`, LEADERBOARD.md and report.html.
        methods: names to run; default all that there are.
        seeds: 0, 1, … below it.
        device: "auto", "cpu" or "cuda".
        progress: told about every cell.
        cases: names to run; default all of the profile.
        workers: processes that share the cases, and the methods of the last ones. The same command on another machine
            or GPU shares them as well, if it sees the same folder.
        texts: folder of the texts that experts of the full text suite are trained on; default what POLYMERGE_TEXTS
            names. Cases that lack them are left out (`left_out` says which).
        parent: of a helping process, which ends when that one has.

    Raises:
        PolymergeError: an unknown suite, profile, method or case; a case asked for that lacks its texts; a folder that
            cannot be written; a method that failed by a bug, after all other rows are written.
    """
    from polymerge.merge import pick_device

    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells every process; the parent ends its helpers
    if suite not in (*SUITES, "all") or profile not in PROFILES:
        raise PolymergeError(
            f"bench: no {suite}/{profile}; suites: {', '.join(SUITES)}, all; profiles: {', '.join(PROFILES)}"
        )
    wanted, place, store = table.chosen(methods), pick_device(device), Store(out)
    found = {name: _suite(name, profile, texts) for name in _named(suite)}
    names = {case.name: suite.lack(case) for suite in found.values() for case in suite.cases}
    for case_name in cases or ():
        if case_name not in names:
            raise PolymergeError(f"bench: no case {case_name!r} in {suite}/{profile}; known: {', '.join(names)}")
        if names[case_name]:
            raise PreflightError(f"bench: case {case_name}: {names[case_name]}")
    progress = progress or Quiet()
    out = Path(out)
    more = {"methods": methods, "seeds": seeds, "device": device, "cases": cases, "texts": texts}
    more["parent"] = os.getpid()
    context = get_context("spawn")
    helpers = [
        context.Process(target=run, args=(suite, profile, out), kwargs=more, daemon=True) for _ in range(workers - 1)
    ]
    try:
        for helper in helpers:
            helper.start()
        for name, its in found.items():
            picked = [c for c in its.cases if (c.name in cases if cases else not names[c.name])]
            Cells(name, profile, store, wanted, seeds, place, progress, out, parent).run(picked, its)
    finally:
        for helper in helpers:
            helper.terminate()
        if parent is None and store.keys():
            report(out)
    return store.read()


def workers(device: str) -> int:
    """How many processes suit a machine: they take about a gigabyte each, and share a GPU well only under MPS."""
    from polymerge.merge import pick_device

    return min(MOST_WORKERS, os.cpu_count() or 1) if pick_device(device) == "cpu" else 1


def report(
    places: Path | str | Sequence[Path | str], out: Path | str | None = None, leaderboard: Path | str | None = None
) -> tuple[Path, Path]:
    """Write the leaderboard and report.html from rows alone; returns both paths.

    Args:
        places: folders of benchmarks, or files of rows (`*.jsonl`).
        out: folder of report.html; default the first of the places, or its folder.
        leaderboard: where that goes; default LEADERBOARD.md in `out`.

    Raises OutputError: no rows there, or files that cannot be read or written.
    """
    from polymerge.report import bench, page

    places = [places] if isinstance(places, str | Path) else list(places)
    first = Path(places[0])
    out = Path(out) if out is not None else first.parent if first.is_file() else first
    paths = Path(leaderboard) if leaderboard is not None else out / "LEADERBOARD.md", out / "report.html"
    rows = gather(places)
    if not rows:
        said = ", ".join(map(str, places))
        raise OutputError(f"{said}: no rows of a benchmark; run `polymerge bench` first")
    for path, text in zip(paths, (board.write(rows), bench.page(rows)), strict=True):
        page.save(path, text)
    return paths


def left_out(suite: str, profile: str, texts: Path | str | None = None) -> list[str]:
    """A line for each reason for which cases of a run cannot be done here: "18 cases of text cannot: needs …"."""
    lines = []
    for name in _named(suite):
        its = _suite(name, profile, texts)
        lacks = [its.lack(case) for case in its.cases]
        lines += [f"{lacks.count(why)} cases of {name} cannot: {why}" for why in sorted(set(lacks)) if why]
    return lines


def _named(suite: str) -> tuple[str, ...]:
    return SUITES if suite == "all" else (suite,)


def _suite(name: str, profile: str, texts: Path | str | None) -> Suite:
    if name == "modular":
        if profile == "medium":
            raise PolymergeError("bench: modular has no profile medium; profiles: quick, full")
        from polymerge.bench import modular
        from polymerge.bench.modular_bed import ModularBed

        settings = modular.PROFILES[profile]

        def modular_bed(
            case: Case, seed: int, device: str, own: Path, shared: Path, tell: Callable[[str], None]
        ) -> Bed:
            return ModularBed(case, seed, settings, own, shared=shared, device=device, progress=tell)

        def experts(cases: Sequence[Case], seeds: int, device: str, tell: Callable[[str], None]) -> None:
            if device != "cpu":
                orders = modular.orders(cases, settings, seeds, modular.cache_folder())
                modular.train_stacks(orders, device=device, progress=tell)

        return Suite(modular.cases(profile), modular_bed, prepare=experts)
    from polymerge.bench import text, text_bed, text_experts

    folder = text_experts.texts_folder(Path(texts) if texts else None)

    def bed(case: Case, seed: int, device: str, own: Path, shared: Path, tell: Callable[[str], None]) -> Bed:
        return text_bed.TextBed(case, seed, own, shared=shared, texts=folder, device=device, progress=tell)

    return Suite(text.cases(profile), bed, lambda case: text.lacking(case, folder))


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
        if shared.exists() and not self._left(case, seed) and self._deserted(case, seed):
            shutil.rmtree(shared, ignore_errors=True)

    def _deserted(self, case: Case, seed: int) -> bool:
        """Whether no process is at any method of a case, those that this run was not asked for included."""
        with ExitStack() as locks:
            claims = (self._claim(case, seed, method) for method in table.known())
            return all(locks.enter_context(held(claim, wait=False)) for claim in claims)

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
            **{k: getattr(outcome, k) for k in ("scores", "parameters", "size", "tokens", "steps", "flops", "extra")},
            "notes": without_folders(outcome.notes),
            **summarise(outcome.scores, bed.owners, bed.anchor_scores, bed.metric),
            "seconds": clock.seconds["run"] - bed.shared.spent[0] + outcome.reused[0],
            "cpu_seconds": clock.cpu_seconds["run"] - bed.shared.spent[1] + outcome.reused[1],
            "peak_bytes": peak(self.device),
        }

    def _row(self, case: Case, seed: int, method: str, **facts: Any) -> Row:
        again = f"polymerge bench {self.suite} --profile {self.profile} --case {case.name} --methods {method}"
        command = f"{again} --seeds {seed + 1} --out {self.out.name}"
        return Row(self.suite, self.profile, case.name, seed, method, command=command, **self.about, **facts)
