"""Training of small decoders that answer at the third token, from scratch; the best state is kept.

step_val_acc_99: the first of the evaluations (every 10 updates, 4,096 draws from the validation pairs) with an accuracy
over 0.99; the number of updates allowed if there is none.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from polymerge.bench.answers import Weights, answers, beginnings, initial
from polymerge.bench.graph import captured, set_rate
from polymerge.model.spec import Spec
from polymerge.teachers import uses_bfloat16


@dataclass(frozen=True)
class Training:
    """AdamW with linear warm-up, as in the seed experiment; `enough`: updates to go on after `target` is reached."""

    steps: int = 7500
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.5
    warmup: int = 50
    batch: int = 512
    every: int = 10
    draws: int = 4096
    target: float = 0.999
    enough: int | None = 200


@dataclass
class Trained:
    """What came out: the best state on validation, and the seed experiment's figures (of the last state, as there)."""

    weights: Weights
    steps: int
    step_val_acc_99: int
    best_step: int
    best_val_acc: float
    final: dict[str, float]
    seconds: float
    cpu_seconds: float
    curve: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """All but the weights; JSON-ready."""
        return {key: value for key, value in vars(self).items() if key != "weights"}


@dataclass(frozen=True)
class Study:
    """What one expert learns from, what it is validated on, and its seed."""

    rows: Int[Tensor, "row 4"]
    validation: Int[Tensor, "held_out 4"]
    seed: int


def together(
    spec: Spec,
    studies: Sequence[Study],
    settings: Training,
    *,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> list[Trained]:
    """Train decoders of one shape side by side, as one stack of weights: on a GPU a dozen take the time of one.

    Each learns as it would alone, from its own rows and seed; one that has learned enough is put by, the others go on.
    The seconds of each are those of the whole stack until then.
    """
    generators = [torch.Generator().manual_seed(one.seed) for one in studies]
    weights = to(_stacked([initial(spec, generator) for generator in generators]), device)
    data, held_out = (_Rows.of([getattr(s, part) for s in studies], device) for part in ("rows", "validation"))
    optimiser = _adamw(weights, settings, device)
    half = uses_bfloat16("auto", torch.device(device))
    mixed = partial(torch.autocast, device.split(":", maxsplit=1)[0], torch.bfloat16, enabled=half)
    chosen = torch.zeros(len(studies), settings.batch, dtype=torch.long, device=device)

    def update() -> Tensor:
        """One step on the chosen rows; (loss, accuracy) of each expert."""
        batch, which = data.rows.gather(1, chosen[..., None].expand(-1, -1, 4)), data.which.gather(1, chosen)
        with mixed():
            logits = _each(partial(_answers, spec), weights, batch, data.starts, which)
        answer = batch[..., 3]
        loss = F.cross_entropy(logits.float().flatten(0, 1), answer.flatten(), reduction="none").view_as(answer).mean(1)
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        return torch.stack([loss.detach(), (logits.argmax(-1) == answer).float().mean(1)], dim=1)

    @torch.no_grad()
    def validate() -> tuple[Tensor, Tensor]:
        """(right, loss) of each expert's every validation row."""
        with mixed():
            logits = _each(partial(_answers, spec), weights, held_out.rows, held_out.starts, held_out.which)
        answer = held_out.rows[..., 3]
        losses = F.cross_entropy(logits.float().flatten(0, 1), answer.flatten(), reduction="none").view_as(answer)
        return logits.argmax(-1) == answer, losses

    step_once, validate_once = captured(update, device, optimiser), captured(validate, device)
    pupils = [_Pupil(one, settings, generator) for one, generator in zip(studies, generators, strict=True)]
    recent: list[Tensor] = []
    for step in range(1, settings.steps + 1):
        set_rate(optimiser, settings.lr * min(1.0, step / settings.warmup))
        chosen.copy_(torch.stack([pupil.draw(len(pupil.study.rows), settings.batch) for pupil in pupils]))
        recent.append(step_once().clone())
        if step % settings.every:
            continue
        right, losses = (t.cpu() for t in validate_once())
        trained = torch.stack(recent).mean(0).cpu()
        for k, pupil in enumerate(pupils):
            pupil.validated(step, right[k], losses[k], trained[k].tolist(), partial(_one, weights, k))
        recent = recent[-10:]
        if step % (10 * settings.every) == 0:
            progress(f"step {step}, validation accuracy {min(pupil.last for pupil in pupils):.3f}")
        if all(pupil.done for pupil in pupils):
            break
    return [pupil.trained for pupil in pupils]


class _Pupil:
    """One expert of a stack: its draws, its best state and the seed experiment's figures."""

    def __init__(self, study: Study, settings: Training, generator: torch.Generator) -> None:
        self.study, self.settings, self.generator = study, settings, generator
        self.began, self.began_cpu = time.perf_counter(), time.process_time()
        self.reached: int | None = None
        self.score, self.last, self.done = (-1.0, 0.0), 0.0, False
        self.trained = Trained({}, 0, settings.steps, 0, 0.0, {}, 0.0, 0.0)

    def draw(self, among: int, count: int) -> Tensor:
        return torch.randint(among, (count,), generator=self.generator)

    def validated(
        self, step: int, right: Tensor, losses: Tensor, recent: Sequence[float], weights: Callable[[], Weights]
    ) -> None:
        """Take note of a validation; rows past the expert's own are padding."""
        if self.done:
            return
        own, out, settings = len(self.study.validation), self.trained, self.settings
        right, losses = right[:own].float(), losses[:own]
        drawn = self.draw(own, settings.draws)
        self.last = float(right[drawn].mean())
        if self.last > 0.99 and out.step_val_acc_99 == settings.steps:  # noqa: PLR2004  the seed's threshold
            out.step_val_acc_99 = step
        score = (float(right.mean()), -float(losses.mean()))
        if score > self.score:
            self.score, out.weights, out.best_step, out.best_val_acc = score, weights(), step, score[0]
        if self.reached is None and score[0] >= settings.target:
            self.reached = step
        enough = self.reached is not None and settings.enough is not None and step >= self.reached + settings.enough
        out.steps, self.done = step, enough or step == settings.steps
        if step % (10 * settings.every) == 0 or step == settings.steps:
            point = {"step": step, "train_loss": recent[0], "train_acc": recent[1]}
            out.curve.append(point | {"val_loss": -score[1], "val_acc": self.last})
        out.final = {
            "final_train_loss": recent[0], "final_train_acc": recent[1],
            "final_val_loss": float(losses[drawn].mean()), "final_val_acc": self.last,
        }  # fmt: skip
        out.seconds, out.cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.began_cpu


@dataclass(frozen=True)
class _Rows:
    """Rows of several experts, padded to the longest; their beginnings, and which of them each row has."""

    rows: Int[Tensor, "expert row 4"]
    starts: Int[Tensor, "expert start 2"]
    which: Int[Tensor, "expert row"]

    @classmethod
    def of(cls, each: Sequence[Tensor], device: str) -> "_Rows":
        begun = [beginnings(rows) for rows in each]
        parts = (each, [starts for starts, _ in begun], [which for _, which in begun])
        return cls(*(pad_sequence(list(part), batch_first=True).to(device) for part in parts))


def _answers(spec: Spec, weights: Weights, rows: Tensor, starts: Tensor, which: Tensor) -> Tensor:
    return answers(spec, weights, rows, (starts, which))


def _each(work: Callable[..., Tensor], weights: Weights, *data: Tensor) -> Tensor:
    """`work` for every expert of a stack."""
    if len(data[0]) == 1:  # as it is: batched products of one are slower
        return work(_one(weights, 0, view=True), *(part[0] for part in data))[None]
    out: Tensor = torch.vmap(work)(weights, *data)
    return out


def _stacked(each: Sequence[Weights]) -> Weights:
    """The weights of several decoders, a new first axis over them."""
    return {
        layer: {role: torch.stack([w[layer][role] for w in each]) for role in part} for layer, part in each[0].items()
    }


def _one(weights: Weights, k: int, *, view: bool = False) -> Weights:
    """The weights of decoder k of a stack: a view, or a detached copy."""
    return {
        layer: {role: w[k] if view else w[k].detach().clone() for role, w in part.items()}
        for layer, part in weights.items()
    }


def to(weights: Mapping[int | None, Mapping[str, Tensor]], device: str) -> Weights:
    """A copy of the weights as leaves that want gradients."""
    return {
        layer: {role: w.detach().to(device, copy=True).requires_grad_() for role, w in part.items()}
        for layer, part in weights.items()
    }


def copy(weights: Weights) -> Weights:
    """The weights as they are now, detached."""
    return {layer: {role: w.detach().clone() for role, w in part.items()} for layer, part in weights.items()}


def _adamw(weights: Weights, settings: Training, device: str) -> torch.optim.AdamW:
    """On a GPU its rate is a tensor there, which a graph reads anew each time."""
    flat, gpu = [w for part in weights.values() for w in part.values()], device.startswith("cuda")
    rate = torch.tensor(settings.lr, device=device) if gpu else settings.lr
    betas, decay = settings.betas, settings.weight_decay
    return torch.optim.AdamW(flat, lr=rate, betas=betas, weight_decay=decay, fused=True, capturable=gpu)
