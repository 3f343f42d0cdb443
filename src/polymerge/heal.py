"""Heal: distil a folded model from its experts for a short while, never ending worse than it began.

    minimise  mean over skills and scored positions of KL(teacher ‖ student), lagging skills weighing more
              + a weight, falling to nothing, of how far the owner's states are from where the fold had them stand

by AdamW (Loshchilov & Hutter 2019) with a small learning rate, linear warm-up and linear decay to zero. Folds
are fragile (large steps soon destroy what the closed form built), so the *worst skill* on validation text,

    worst = max over skills of (bits per byte of the student − bits per byte of the skill's owner),

decides: the state with the least is kept, starting with the fold itself; two measurements clearly above it
bring that state back and halve the learning rate, and so does a loss that is not finite.

With a folder for its state a run can be interrupted at any time: called again with the same inputs it goes
on, and ends (on CPU) with the same bytes as a run without interruption. Memory, in float32: weights,
gradients, two Adam moments and the best state. torch is imported when healing begins: a recipe needs only the
settings.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polymerge.errors import RecipeError

_EVALUATION_SHARE = 0.15
_FASTEST = 4e-3
_FAR = 0.2
_FOREIGN_TEXT = 0.8
_LET_GO = 800_000

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Heal:
    """The recipe's `heal:` keys. Raises RecipeError for values out of range.

    Attributes:
        tokens: read in training, over all skills; more than the text has means further passes over it. The default
            costs about what a whole fold with 240 steps of refinement does.
        lr: peak learning rate; by default 1e-3 at 400 k tokens and as the root of their number: the first steps undo
            some of a good start, and the longer the run, the more of that is won back. A start more than 0.2 bits per
            byte behind has the less to lose: in proportion more. 4e-3 at most.
        warmup: share of the run in which it rises.
        batch_rows: rows a step; the further a skill is behind its owner, the larger its share.
        length: tokens a row.
        teacher: each text's owner, or the union of all experts.
        across: what is learned from an owner with another tokenizer: its distribution told in the result's tokens, or
            only the likelihood of the bytes that follow.
        features: weight, at the beginning, of how far the owner's states are from those that the result has in their
            place (`features.py`), beside the divergence; it falls linearly to nothing at 800 k tokens, for a run so
            long is better let go in the end. Only after a fold, and from owners with the result's tokenizer.
        text: share of the text's own next token in the loss on every row; by default 0.8 on the rows of an owner with
            another tokenizer, which knows the result's next token only in part, and none on the others.
        evaluate_every: steps between measurements; by default about eight in a run, every 25 steps in long
            ones, and fewer where the validation text is so long that they would take over 15 % of the time.
        precision: of forward passes; "auto" is bfloat16 autocast where the hardware is faster with it.
    """

    tokens: int = 1_700_000
    lr: float | None = None
    warmup: float = 0.05
    batch_rows: int = 16
    length: int = 128
    teacher: Literal["owner", "union"] = "owner"
    across: Literal["distribution", "likelihood"] = "distribution"
    features: float = 10.0
    text: float | None = None
    evaluate_every: int | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        step = self.batch_rows * self.length
        for key, good, expected in (
            ("batch_rows", self.batch_rows >= 1, "1 or more"),
            ("length", self.length > 1, "2 or more: one token to predict from, one to predict"),
            ("tokens", self.tokens >= step, f"at least one step of batch_rows x length = {step}"),
            ("lr", self.lr is None or 0 < self.lr < math.inf, "a positive number"),
            ("warmup", 0 <= self.warmup < 1, "a share from 0 to below 1"),
            ("teacher", self.teacher in ("owner", "union"), "owner or union"),
            ("across", self.across in ("distribution", "likelihood"), "distribution or likelihood"),
            ("features", 0 <= self.features < math.inf, "a weight of 0 or more"),
            ("text", self.text is None or 0 <= self.text <= 1, "a share from 0 to 1"),
            ("evaluate_every", self.evaluate_every is None or self.evaluate_every >= 1, "1 or more"),
            ("precision", self.precision in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
        ):
            if not good:
                raise RecipeError(f"heal.{key} is {getattr(self, key)!r}; expected {expected}")

    @property
    def steps(self) -> int:
        """Optimiser steps that the tokens are enough for."""
        return self.tokens // (self.batch_rows * self.length)

    def peak(self, behind: float) -> float:
        """The peak learning rate from a start whose worst skill is so many bits per byte behind its owner."""
        if self.lr is not None:
            return self.lr
        return min(_FASTEST, 1e-3 * math.sqrt(self.tokens / 400_000) * max(1.0, behind / _FAR))

    def interval(self, validation_tokens: int) -> int:
        """Steps between measurements."""
        if self.evaluate_every is not None:
            return self.evaluate_every
        # A step costs a forward and a backward pass, about three of the forward passes that measuring takes.
        affordable = validation_tokens / (_EVALUATION_SHARE * 3 * self.batch_rows * self.length)
        about = max(1, math.ceil(affordable), min(25, self.steps // 8))
        return math.ceil(self.steps / max(1, self.steps // about))  # even, so that none falls just before the end

    def text_share(self, *, foreign: bool) -> float:
        """Share of the text's own next token on rows whose owner has another tokenizer, or the result's."""
        if self.text is not None:
            return self.text
        return _FOREIGN_TEXT if foreign else 0.0

    def weight(self, step: int) -> float:
        """Of the owner's states, at a step (from 0)."""
        return self.features * max(0.0, 1 - step * self.batch_rows * self.length / _LET_GO)

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0), as a part of the peak."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return (step + 1) / rising
        return (self.steps - step) / (self.steps - rising)


@dataclass(frozen=True)
class Point:
    """One measurement, in bits per byte; `loss` is the mean since the last one, in nats per token, without features."""

    step: int
    tokens: int
    loss: float | None
    lr: float
    validation: dict[str, float]
    worst: float
    seconds: float
    best: bool
    event: str | None = None


@dataclass(frozen=True)
class HealResult:
    """What healing did; `before`, `after` and `reference` are validation bits per byte by skill.

    `reference` is the owner's; `after` belongs to `best_step`, whose state the student holds. `lr` is the peak.
    """

    steps: int
    tokens: int
    seconds: float
    lr: float
    best_step: int
    before: dict[str, float]
    after: dict[str, float]
    reference: dict[str, float]
    curve: tuple[Point, ...]
    stopped_early: bool
    warning: str | None


def heal(
    student: Any,
    teachers: Any,
    rows: Mapping[str, Any],
    validation: Mapping[str, Any],
    settings: Heal,
    *,
    guide: Any = None,
    features: Mapping[str, Any] | None = None,
    out: Path | None = None,
    seed: int = 0,
    device: Any = "cpu",
    progress: Progress = lambda _step, _steps, _text: None,
) -> HealResult:
    """Distil `student` in place; it ends in evaluation mode, in its best state.

    Args:
        student: a loaded causal LM in float32.
        teachers: skill name -> its owner, or a `UnionForCausalLM` (for `teacher="union"`); put on `device`.
        rows: skill name -> calibration rows of `settings.length` tokens.
        validation: skill name -> rows never trained on; they choose the state, so they are no test.
        settings: the recipe's keys.
        guide: a model whose distributions are learned, of all skills, instead of the teachers'; those are still what
            the result is compared with.
        features: skill name -> `Features` of its owner, where the student is a fold.
        out: folder for the resumable state (`heal.pt`) and the log (`heal.jsonl`, a line a measurement).
        seed: of the order of the rows.
        device: where all models run.
        progress: called with (step, steps, text).

    Raises:
        ValueError: skills that do not match, or a student in half precision.
        RecipeError: rows of another length than the settings say.
        OutputError: `out` cannot be written, or holds the state of another run.
    """
    import torch

    from polymerge import teachers as learning
    from polymerge.heal_run import Run
    from polymerge.heal_state import Folder

    if student.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the student is in {student.dtype}; expected float32: small updates vanish in less")
    skills = learning.check_rows(rows, validation, settings.length)
    guides, owners = learning.resolve(teachers, settings.teacher, skills)
    guides = guides if guide is None else dict.fromkeys(skills, guide)
    run = Run(
        student, guides, owners, settings, rows=rows, validation=validation, features=features, seed=seed, device=device
    )
    run.progress = progress
    if out is not None:
        run.resume(Folder(out, run.inputs()))
    with run.prepared():
        try:
            run.train()
        except KeyboardInterrupt:
            run.save(due=False)
            raise
    return run.result()
