"""Distillation of the text suite: the same tokens at each learning rate of a grid, the best by its worst skill kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from polymerge.bench.rows import training_flops
from polymerge.calibrate.packing import Rows
from polymerge.features import Features
from polymerge.heal import Heal, heal


@dataclass(frozen=True)
class Best:
    """The model at the best of the rates, in its best state; `done` is what `heal` said, `note` and `extra` a row's."""

    model: Any
    done: Any
    note: str
    extra: dict[str, Any]


def at_best_rate(
    student: Callable[[], Any],
    teachers: Mapping[str, Any],
    rows: Mapping[str, Rows],
    held_out: Mapping[str, Rows],
    settings: Heal,
    rates: Sequence[float | None],
    *,
    guide: Any = None,
    features: Mapping[str, Features] | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> Best:
    """Heal a fresh student at each rate (None: its default); the least worst skill held out wins, then the lower."""
    runs = []
    for lr in rates:
        progress(f"distil at {lr or 'the default rate'}")
        model = student()
        asked = replace(settings, lr=lr)
        done = heal(model, teachers, rows, held_out, asked, guide=guide, features=features, seed=seed, device=device)
        runs.append((min(point.worst for point in done.curve), done.lr, model, done))
    _, lr, model, done = min(runs, key=lambda run: run[:2])
    note = f"learning rate {lr:g}{f' of {len(runs)} tried' * (len(runs) > 1)}, best state at step {done.best_step}"
    extra = {
        "lr": lr, "lr_trials": {f"{rate:g}": worst for worst, rate, _, _ in runs},
        "best_step": done.best_step, "curve": [asdict(point) for point in done.curve],
    }  # fmt: skip
    return Best(model, done, note, extra)


def operations(
    parameters: int,
    tokens: int,
    runs: int,
    teachers: Sequence[int],
    features: Sequence[Features] = (),
    *,
    fused: bool = False,
) -> int:
    """Of matrix products in `runs` such distillations; a row is read by its owner, by about equally many each.

    `fused`: by every teacher.
    """
    share = runs * tokens // (1 if fused else len(teachers))
    spent = training_flops(parameters, tokens, runs=runs, teachers=[(size, share) for size in teachers])
    return spent + share * sum(one.operations for one in features)
