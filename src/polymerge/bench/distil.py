"""Distillation at the answer's position: what heals a fold, and what the padded and from-scratch controls learn by.

    minimise  mean over rows of KL(owner ‖ student) at the third token

by AdamW without weight decay, short warm-up, linear decay to zero. Every method gets the same rows, steps and the
same grid of learning rates; rate and state are chosen by the worst skill on validation pairs, step 0 included.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polymerge.bench.answers import Weights, answers, measure
from polymerge.bench.train import copy, to
from polymerge.divergence import kl
from polymerge.model.spec import Spec
from polymerge.teachers import uses_bfloat16


@dataclass(frozen=True)
class Distil:
    """`steps` of `batch` rows at each of the peak rates `lrs`; measured `every` so many steps."""

    steps: int = 100
    batch: int = 512
    lrs: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3)
    every: int = 10
    warmup: float = 0.1


@dataclass(frozen=True)
class Lesson:
    """A skill's training rows and its owner's logits at their third tokens."""

    rows: Int[Tensor, "row 4"]
    logits: Float[Tensor, "row vocab"]


@dataclass
class Distilled:
    """The best state; `curve`: step, accuracy by skill, worst, at the chosen rate; `first_99`: the first over 0.99."""

    weights: Weights
    lr: float
    best_step: int
    first_99: int | None
    curve: list[dict[str, Any]] = field(default_factory=list)
    trials: dict[str, float] = field(default_factory=dict)


def distil(
    spec: Spec,
    weights: Weights,
    lessons: Mapping[str, Lesson],
    validation: Mapping[str, Tensor],
    settings: Distil,
    seed: int,
    *,
    device: str = "cpu",
) -> Distilled:
    """The best of the runs, one for each learning rate."""
    runs = [_run(spec, weights, lessons, validation, settings, lr, seed, device) for lr in settings.lrs]
    best = max(runs, key=lambda run: run[0])[1]
    best.trials = {f"{run.lr:g}": score[0] for score, run in runs}
    return best


def _run(
    spec: Spec,
    weights: Weights,
    lessons: Mapping[str, Lesson],
    validation: Mapping[str, Tensor],
    settings: Distil,
    lr: float,
    seed: int,
    device: str,
) -> tuple[tuple[float, float], Distilled]:
    """One learning rate: ((worst accuracy, minus mean loss), outcome)."""
    generator = torch.Generator().manual_seed(seed)
    moved = to(weights, device)
    flat = [w for part in moved.values() for w in part.values()]
    optimiser = torch.optim.AdamW(flat, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    half, kind = uses_bfloat16("auto", torch.device(device)), device.split(":", maxsplit=1)[0]
    share = settings.batch // len(lessons)
    best_score, out = (-1.0, 0.0), Distilled(weights, lr, 0, None)
    for step in range(settings.steps + 1):
        if step % settings.every == 0 or step == settings.steps:
            score, point = _validate(spec, moved, validation, device)
            out.curve.append({"step": step, **point})
            if out.first_99 is None and score[0] > 0.99:  # noqa: PLR2004  the seed's threshold
                out.first_99 = step
            if score > best_score:
                best_score, out.best_step, out.weights = score, step, copy(moved)
        if step == settings.steps:
            break
        done = (step + 1) / settings.steps
        for group in optimiser.param_groups:
            group["lr"] = lr * min(done / settings.warmup, (1 - done) / (1 - settings.warmup) + 1e-3)
        drawn = [(x, torch.randint(len(x.rows), (share,), generator=generator)) for x in lessons.values()]
        rows = torch.cat([x.rows[i] for x, i in drawn]).to(device)
        goal = torch.cat([x.logits[i] for x, i in drawn]).to(device)
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            logits = answers(spec, moved, rows)
        loss = kl(logits, goal).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flat, 1.0)
        optimiser.step()
    return best_score, out


def _validate(
    spec: Spec, weights: Weights, validation: Mapping[str, Tensor], device: str
) -> tuple[tuple[float, float], dict[str, float]]:
    found = {name: measure(spec, weights, rows.to(device)) for name, rows in validation.items()}
    accuracy = {name: float(right.float().mean()) for name, (right, _) in found.items()}
    loss = sum(float(losses.mean()) for _, losses in found.values()) / len(found)
    worst = min(accuracy.values())
    return (worst, -loss), {**accuracy, "worst": worst}
