"""LEADERBOARD.md, from rows alone: the same rows give the same bytes, whatever order they were written in."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from polymerge.bench.methods import METHODS
from polymerge.bench.modular import RUNS, SHAPES
from polymerge.bench.rows import Row

SEED: Mapping[int, Mapping[str, tuple[float, int]]] = {
    0: {
        "x_div_y": (0.99984, 3853),
        "x_minus_y": (0.95931, 4533),
        "x_plus_y": (0.99919, 2877),
        "permutation": (0.65234, 7460),
    },
    1: {"x_div_y": (1.0, 3277), "x_minus_y": (1.0, 3473), "x_plus_y": (1.0, 2320), "permutation": (0.69849, 6290)},
    2: {"x_div_y": (1.0, 2500), "x_minus_y": (0.99772, 3300), "x_plus_y": (0.99984, 1743), "permutation": (1.0, 6190)},
    3: {"x_div_y": (0.99992, 2860), "x_minus_y": (1.0, 3247), "x_plus_y": (1.0, 2060), "permutation": (0.14323, 7500)},
    4: {
        "x_div_y": (0.99967, 2537),
        "x_minus_y": (0.99341, 2530),
        "x_plus_y": (1.0, 2097),
        "permutation": (0.88444, 5210),
    },
}
"""The seed experiment: run (0: baseline) -> task -> (final_val_acc_mean, step_val_acc_99_mean), as it was published."""

NAMES = {
    "expert": "expert, from scratch", "fold_heal": "fold + heal", "best_expert": "best single expert",
    "ensemble": "probability ensemble", "anchor": "anchor alone", "anchor_distill": "anchor padded + distilled",
    "scratch_distill": "same size from scratch, distilled", "shrink": "shrink-only (anchor folded)",
    "placebo": "fold, shuffled donor",
}  # fmt: skip


def write(rows: Sequence[Row]) -> str:
    """The whole page."""
    parts = ["# Leaderboard", _preface(rows)]
    modular = [r for r in rows if r.suite == "modular"]
    same = [r for r in modular if r.setting.get("protocol") in ("baseline", "same")]
    cross = [r for r in modular if r.setting.get("protocol") == "cross"]
    if same:
        parts += ["## Modular arithmetic: one task, experts of different architecture", SAME, _same(same)]
        parts += _per_case([r for r in same if r.setting.get("protocol") == "same"])
    if cross:
        parts += ["## Modular arithmetic: several tasks in one model", CROSS, *_per_case(cross)]
    if text := [r for r in rows if r.suite == "text"]:
        parts += ["## Text", TEXT, *_per_case(text)]
    if first := _winners(rows):
        parts.insert(2, first)
    return "\n\n".join(parts) + "\n"


QUICK = (
    "The quick profile has one seed, one pair of tasks of the six, one kind of difference of the four, one size of"
    " three, no permutations, and less healing than the full profile: a smoke test of the claims, no proof."
)
FAVOUR = (
    "Controls and rivals take the fold's shape. Where they cannot, they get the least shape that holds the experts,"
    " with more parameters if need be: in their favour, and said in their notes."
)
SAME = (
    "Test accuracy, and updates until validation accuracy is over 0.99 (`step_val_acc_99`; 0: before any training)."
    " The seed experiment's figures are validation accuracies of its last state; its merged models were trained from"
    " scratch for thousands of updates."
)
CROSS = (
    "Test accuracy of each task. *Worst* is the skill that lost most against its owner; *gap* is the share of the"
    " distance from the anchor to the owner that is closed."
)
TEXT = "Bits per byte of each skill on its test text; less is better."


def _preface(rows: Sequence[Row]) -> str:
    seen = {
        key: sorted({str(getattr(r, key)) for r in rows if getattr(r, key) != ""})
        for key in ("profile", "device", "commit")
    }
    lines = [f"- {key}: {', '.join(values)}" for key, values in seen.items() if values]
    versions = sorted({f"{k} {v}" for r in rows for k, v in r.versions.items()})
    parts = ["Made from the rows by `polymerge report`; edit nothing here."]
    parts += [FAVOUR]
    parts += [QUICK] if any(r.profile == "quick" for r in rows) else []
    return "\n\n".join([*parts, "\n".join([*lines, f"- versions: {', '.join(versions)}", f"- rows: {len(rows)}"])])


def _winners(rows: Sequence[Row]) -> str:
    """Where something else beats the fold with healing, it is said first."""
    lines = []
    for case, group in _by(rows, "case"):
        scored = [(m, _mean(some, "worst")) for m, some in _by([r for r in group if r.worst is not None], "method")]
        up = 1 if group[0].metric == "accuracy" else -1
        ours = [score for name, score in scored if name in ("fold", "fold_heal")]
        if not ours:
            continue
        best = max(up * s for s in ours)
        single = {"union", "ensemble"}  # several models, not one
        ahead = [
            (n, s)
            for n, s in scored
            if up * s > best + 1e-9 and n not in single and METHODS.get(n, ("rival",))[0] != "ours"
        ]
        said = ", ".join(f"{_name(n)} {s:.4f}" for n, s in sorted(ahead, key=lambda item: -up * item[1]))
        if said:
            lines.append(f"- {case}: {said} (ours {up * best:.4f})")
    return "## Where ours does not win (worst skill)\n\n" + "\n".join(lines) if lines else ""


def _same(rows: Sequence[Row]) -> str:
    """The seed's table beside ours: a line for each task and run."""
    head = ["task", "run", "seed: accuracy", "seed: steps", "expert alone: accuracy", "expert alone: steps"]
    lines, shapes = [], {0: SHAPES["base"]} | {run: SHAPES[kind] for kind, run in RUNS.items()}
    for task in dict.fromkeys(t for numbers in SEED.values() for t in numbers):
        for run in SEED:
            here = [r for r in rows if task in r.scores and r.setting.get("run") == run]
            alone = [r for r in rows if r.method == "expert" and task in r.scores and _shape(r) == shapes[run]]
            if not (here or alone):
                continue
            accuracy, steps = SEED[run][task]
            line = [task, str(run), f"{accuracy:.4f}", str(steps), _scores(alone, task), _steps(alone)]
            for method in ("fold", "fold_heal", "scratch_distill"):
                some = [r for r in here if r.method == method]
                line += [_scores(some, task), _steps(some)]
            lines.append(line)
    for method in ("fold", "fold_heal", "scratch_distill"):
        head += [f"{_name(method)}: accuracy", "steps"]
    return _table(head, lines)


def _shape(row: Row) -> tuple[int, int, int]:
    return tuple(row.size.get(key, 0) for key in ("layers", "width", "heads"))


def _steps(rows: Sequence[Row]) -> str:
    steps = [r.extra.get("step_val_acc_99") for r in rows]
    if not steps:
        return "–"
    known = [s for s in steps if s is not None]
    return f"{mean(known):.0f}" if len(known) == len(steps) else "not reached"


def _per_case(rows: Sequence[Row]) -> list[str]:
    """A table for each case: methods by worst skill, best first; those that cannot do it last, with the reason."""
    return [f"### {case}\n\n{_about(group[0])}\n\n{_case(group)}" for case, group in _by(rows, "case")]


def _about(row: Row) -> str:
    experts = ", ".join(f"{name} ({n:,})" for name, n in row.expert_parameters.items())
    owners = ", ".join(f"{skill} {score:.4f}" for skill, score in sorted(row.owners.items()))
    return f"Experts (parameters): {experts}. Owners: {owners}. Budget: {row.budget}."


def _case(rows: Sequence[Row]) -> str:
    skills = sorted({skill for r in rows for skill in r.owners})
    up = 1 if rows[0].metric == "accuracy" else -1
    head = ["method", *skills, "worst", "gap", "parameters", "training tokens", "CPU s", "peak GB", "notes", "again"]
    good, bad = [], []
    for name, some in _by(rows, "method"):
        done = [r for r in some if r.status == "ok"]
        command = f"`{some[0].command}`" if some[0].command else "–"
        if not done:
            bad.append([_name(name), *["–"] * (len(head) - 3), f"cannot: {some[0].reason}", command])
            continue
        line = [_name(name), *(_scores(done, s) for s in skills), _figure([r.worst for r in done])]
        line += [_figure([r.gap_closed for r in done], 2), _count(done[0].parameters), _count(done[0].tokens)]
        line += [
            f"{mean(r.cpu_seconds for r in done):.1f}",
            f"{max(r.peak_bytes for r in done) / 1e9:.2f}",
            done[0].notes,
        ]
        good.append((-up * _mean(done, "worst"), name, [*line, command]))
    return _table(head, [line for _, _, line in sorted(good, key=lambda item: item[:2])] + bad)


def _scores(rows: Sequence[Row], skill: str) -> str:
    return _figure([r.scores.get(skill) for r in rows])


def _figure(values: Iterable[float | None], digits: int = 4) -> str:
    """The mean, ± the spread where there is more than one seed."""
    some = [v for v in values if v is not None]
    if not some:
        return "–"
    return f"{mean(some):.{digits}f}" + (f" ± {stdev(some):.{digits}f}" if len(some) > 1 else "")


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(mean(getattr(r, key) for r in rows))


def _count(number: int | None) -> str:
    return "–" if not number else f"{number:,}"


def _name(method: str) -> str:
    return NAMES.get(method, method)


def _by(rows: Sequence[Row], key: str) -> list[tuple[str, list[Row]]]:
    """Groups in sorted order."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.key):
        found.setdefault(getattr(row, key), []).append(row)
    return sorted(found.items())


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, *lines)]
    made = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([made[0], "|" + "---|" * len(head), *made[1:]])
