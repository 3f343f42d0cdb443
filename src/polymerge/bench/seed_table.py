"""The seed experiment's figures beside ours: a line for each task and run, and every architecture from scratch."""

from collections.abc import Mapping, Sequence
from statistics import mean

from polymerge.bench import board
from polymerge.bench.methods import known
from polymerge.bench.modular import RUNS, SHAPES
from polymerge.bench.rows import Row, judged

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


def same(rows: Sequence[Row]) -> "board.Table":
    """The seed's table beside ours: a line for each task and run; two whole experts, as the seed's were."""
    whole = [r for r in rows if not r.case.endswith("/by-heart")]  # of the same run's number
    head = ["task", "run", "seed: accuracy", "seed: steps", "expert alone: accuracy", "expert alone: steps"]
    lines, shapes = [], {0: SHAPES["base"]} | {run: SHAPES[kind] for kind, run in RUNS.items()}
    for task in dict.fromkeys(t for numbers in SEED.values() for t in numbers):
        for run in SEED:
            here = [r for r in whole if task in r.scores and r.setting.get("run") == run]
            alone = [r for r in rows if r.method == "expert" and task in r.scores and _shape(r) == shapes[run]]
            if not (here or alone):
                continue
            accuracy, steps = SEED[run][task]
            line = [task, str(run), f"{accuracy:.4f}", str(steps), board.scores(alone, task), _steps(alone)]
            for method in ("fold", "fold_heal", "scratch_distill"):
                some = [r for r in here if r.method == method]
                line += [board.scores(some, task), _steps(some)]
            lines.append([*line, _best_rival(here, task)])
    for method in ("fold", "fold_heal", "scratch_distill"):
        head += [f"{board.name_of(method)}: accuracy", f"{board.name_of(method)}: steps"]
    return board.Table("", f"Profile: {rows[0].profile}.", [*head, "best rival: accuracy"], lines)


def _best_rival(rows: Sequence[Row], task: str) -> str:
    """The rival that is most accurate, with its name."""
    groups = known()
    found = [
        (mean(scores), board.name_of(name))
        for name, some in board.by(rows, "method")
        if groups.get(name, ("rival",))[0] == "rival"
        and (scores := [score for r in some if task in r.scores and (score := judged(r)) is not None])
    ]
    best = max(found, default=None)
    return f"{board.number(best[0])} {best[1]}" if best else "–"


def scratch(rows: Sequence[Row]) -> "board.Table":
    """The baseline: every architecture from scratch on its task, with the seed experiment's figures."""
    finals = ("final_train_loss", "final_train_acc", "final_val_loss", "final_val_acc")
    head = ["expert", "test accuracy", *finals, "step_val_acc_99", *board.COST, "again"]
    lines = []
    for case, some in board.cases(rows):
        done = [r for r in some if r.status == "ok"]
        found = [board.figure([r.extra.get(key) for r in done]) for key in finals]
        score = board.figure(map(judged, done))
        lines.append([case.removeprefix("baseline/"), score, *found, _steps(done), *board.cost(done), some[-1].command])
    return board.Table(
        "From scratch", "The experts' own training; losses in nats.", head, lines, groups=board.cases(rows)
    )


def _shape(row: Row) -> tuple[int, int, int]:
    return tuple(row.size.get(key, 0) for key in ("layers", "width", "heads"))


def _steps(rows: Sequence[Row]) -> str:
    steps = [r.extra.get("step_val_acc_99") for r in rows]
    if not steps:
        return "–"
    known = [s for s in steps if s is not None]
    return f"{mean(known):.0f}" if len(known) == len(steps) else "not reached"
