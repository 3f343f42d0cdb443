"""Runs the cells of a suite (case × seed × method) that a folder has no row of yet, and writes one row for each.

run("modular", "quick", "out/bench")      # kill it, run it again: it goes on with the next cell
report("out/bench")                       # LEADERBOARD.md, pages of cases and report.html, from the rows alone
"""

import os
import signal
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

from polymerge.bench import board, suites
from polymerge.bench import methods as table
from polymerge.bench.cells import Cells
from polymerge.bench.rows import Row, Store, gather
from polymerge.bench.suites import PROFILES, SUITES
from polymerge.errors import OutputError, PolymergeError, PreflightError
from polymerge.progress import Progress, Quiet

MOST_WORKERS = 4


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
        profile: "quick", "medium" (text alone), "full" or "large" (text alone).
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
    found = {name: suites.find(name, profile, texts) for name in suites.named(suite)}
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
    """Write the leaderboard, the pages of its cases and report.html from rows alone; returns its path and the last one.

    Args:
        places: folders of benchmarks, or files of rows (`*.jsonl`).
        out: folder of report.html and of a page for each suite's cases; default the first of the places, or its folder.
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
    cases = board.write_cases(rows)
    links = {suite: os.path.relpath(out / f"{suite}.md", paths[0].parent) for suite in cases}
    page.folder(out)
    page.save(paths[0], board.write(rows, links))
    page.save(paths[1], bench.page(rows))
    for suite, text in cases.items():
        page.save(out / f"{suite}.md", text)
    return paths
