"""The experts of one modular case, and every method on them (see `modular.py` for the suite)."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from polymerge import families, plan, recipe
from polymerge.bench import methods as table
from polymerge.bench import modular, peer, tokens
from polymerge.bench.answers import Weights, initial
from polymerge.bench.distil import Distilled, Lesson, distil
from polymerge.bench.flops import Products
from polymerge.bench.fuse import fused
from polymerge.bench.machine import children_peak
from polymerge.bench.methods import Case, Outcome, fitting, gathered
from polymerge.bench.rows import training_flops
from polymerge.bench.shared import Shared, folded
from polymerge.calibrate.calibration import Calibration
from polymerge.errors import PreflightError
from polymerge.methods import fold as folding
from polymerge.methods._pad import pad
from polymerge.methods._refine import Refine
from polymerge.model.source import Source
from polymerge.model.spec import Spec

FAMILY = "mistral"
"""Of the results: a Llama decoder without the rule that heads divide the width."""
CLOSE = 0.01
"""Experts this near to the best at a task, on validation pairs, own its rows together with it."""


class ModularBed:
    """See `methods.Bed`. Experts are trained when the bed is made, unless the cache has them."""

    metric = "accuracy"
    bases: tuple[str, ...] = ()
    tries: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        case: Case,
        seed: int,
        settings: modular.Settings,
        scratch: Path,
        *,
        shared: Path | None = None,
        device: str = "cpu",
        cache: Path | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.detail: modular.Detail = case.detail
        self.seed, self.settings, self.device, self.progress = seed, settings, device, progress
        plans, cache = self.detail.experts, cache or modular.cache_folder()
        made = [modular.trained(p, settings, seed, cache=cache, device=device, progress=progress) for p in plans]
        self.records = [record for _, record in made]
        self.experts = [modular.opened(folder, device) for folder, _ in made]
        self.splits = {p.task: settings.arithmetic.split(p.task, seed, p.share) for p in plans}
        self.skills = tuple(self.splits)
        self.validation = {task: split.validation for task, split in self.splits.items()}
        self.table = [self._measured(e) for e in self.experts]
        held = [tokens.accuracy(e.path, self.validation, device) for e in self.experts]
        best = {task: max(scores[task] for scores in held) for task in self.skills}
        self.good = {t: [k for k, scores in enumerate(held) if scores[t] >= best[t] - CLOSE] for t in self.skills}
        self.meant = {t: [k for k, p in enumerate(plans) if p.task == t] for t in self.skills}
        self.part = sorted({k for good in self.good.values() for k in good})
        self.owner = {t: next(k for k, scores in enumerate(held) if scores[t] == best[t]) for t in self.skills}
        self.owners = {task: self.table[self.owner[task]][task] for task in self.skills}
        self.anchor_scores = self.table[0]
        self.expert_parameters = {p.name: e.parameters for p, e in zip(plans, self.experts, strict=True)}
        self.budget = self.detail.budget
        self.setting = {
            "protocol": case.protocol, "run": self.detail.run, "experts": [asdict(p) for p in plans],
            "training": [{k: r[k] for k in ("steps", "step_val_acc_99", "best_val_acc")} for r in self.records],
            "expert_scores": self.table, "anchor": plans[0].name,
        }  # fmt: skip
        self.family = families.get(FAMILY)
        self.shared = Shared(shared or scratch, device)
        self._scratch = scratch

    # ------------------------------------------------------------------ data

    def _measured(self, source: Source) -> dict[str, float]:
        return tokens.accuracy(source.path, {t: s.test for t, s in self.splits.items()}, self.device)

    def texts(self, part: Sequence[int], owners: Mapping[str, Sequence[int]]) -> Calibration:
        """Training pairs to fit, validation pairs held out, for some of the experts; `owners` of each task's rows."""
        said = [(t, k) for t in self.skills for k in owners[t] if k in part]
        if not said:
            raise PreflightError("the anchor is not the best at any of the tasks, so there is nothing to keep of it")
        fitted, held_out = ([getattr(self.splits[t], use) for t, _ in said] for use in ("train", "validation"))
        return tokens.calibration(fitted, held_out, [part.index(k) for _, k in said], len(part))

    def lessons(self) -> dict[str, Lesson]:
        """Training pairs of every skill, with the owner's logits."""
        found = {}
        for task in self.skills:
            rows = self.splits[task].train
            found[task] = Lesson(rows, _answers(self.experts[self.owner[task]], rows, self.device))
        return found

    def shapes(self) -> tuple[Spec, ...]:
        """The result's shapes: the case's budget, at the width of the widest expert or at any that the fold may try."""
        sizes = {str(i): e.parameters for i, e in enumerate(self.experts)}
        limit = {"sum": sum(sizes.values()), "largest": max(sizes.values())}
        width = {} if self.detail.free else {"width": max(e.spec.width for e in self.experts)}
        size = "union" if self.budget == "union" else {"params": limit[self.budget]} | width
        asked = recipe.parse({
            "method": "fold", "anchor": "0", "family": FAMILY, "size": size,
            "experts": {str(i): {"model": str(e.path), "text": "-"} for i, e in enumerate(self.experts)},
        })  # fmt: skip
        specs = {str(i): e.spec for i, e in enumerate(self.experts)}
        return plan.make(asked, specs, sizes, [str(k) for k in self.part]).shapes

    # ------------------------------------------------------------------ ours

    def expert(self) -> Outcome:
        """The single expert of a baseline case, with the seed experiment's figures."""
        record = self.records[0]
        extra = record["final"] | {k: record[k] for k in ("step_val_acc_99", "best_step", "best_val_acc", "curve")}
        read = record["steps"] * self.settings.training.batch * 3
        size = table.size_of(self.experts[0].spec)
        spent = (record["seconds"], record["cpu_seconds"])  # now or when the cache was filled
        flops = training_flops(self.experts[0].parameters, read)
        return Outcome(
            self.table[0], self.experts[0].parameters, size, read, record["steps"], flops, reused=spent, extra=extra
        )

    def union(self) -> Outcome:
        """The Bayesian gate sees p(operation | x) and p(y | …), which these experts were never taught."""
        notes = "gate weights from tokens that the experts were not trained to predict"
        return self._mixed(lambda rows: tokens.gate_weights(self.experts, rows), notes)

    def ensemble(self) -> Outcome:
        """Equal weights."""
        return self._mixed(lambda rows: torch.zeros(len(rows), len(self.experts), dtype=torch.float64), "")

    def fold(self) -> Outcome:
        """Closed form only."""
        return self._folded()[1]

    def fold_heal(self) -> Outcome:
        """The fold, distilled."""
        folder, fold = self._folded()
        source = Source(folder)
        weights: Weights = {None: source.outer()}
        weights |= {layer: source.layer(layer) for layer in range(source.spec.layers)}
        outcome = self._distilled(source.spec, weights, fold.reused)
        outcome.flops, outcome.peak_bytes = (outcome.flops or 0) + (fold.flops or 0), fold.peak_bytes
        return outcome

    def fold_heal_more(self) -> Outcome:
        """A closed form without trials, and healing for all the operations that the fold has left."""
        lean = replace(self.settings.fold, refine=Refine(steps=0, head_steps=0), trials=None)
        done, weights, flops = self._make(lean)
        target = done.choice.target
        steps = self._steps(target, (self._folded()[1].flops or 0) - flops)
        outcome = self._distilled(target, weights, steps=steps)
        outcome.flops = (outcome.flops or 0) + flops
        outcome.notes = f"fold in closed form, without trials; {outcome.steps} steps, {outcome.notes}"
        return outcome

    # ------------------------------------------------------------------ controls

    def anchor(self) -> Outcome:
        """The first expert."""
        return self._single(0)

    def best_expert(self) -> Outcome:
        """By its worst skill."""
        return self._single(max(range(len(self.table)), key=lambda k: (min(self.table[k].values()), -k)))

    def anchor_distill(self) -> Outcome:
        """The anchor in the fold's shape, or in one that holds it."""
        return self._distilled_anchor(self.lessons())

    def anchor_distill_more(self) -> Outcome:
        """The fold's operations spent on steps."""
        return self._distilled_anchor(self.lessons(), steps=self._steps(self._target(), self._folded()[1].flops or 0))

    def fuse_distill(self) -> Outcome:
        """The same from the experts' fused distributions."""
        lessons = {}
        for task, split in self.splits.items():
            logits = torch.stack([_answers(e, split.train, self.device) for e in self.experts])
            goal = fused(logits.log_softmax(-1)[:, :, None], split.train[:, 3:].clone())
            lessons[task] = Lesson(split.train, goal[:, 0])
        return self._distilled_anchor(lessons, fused=True)

    def scratch_distill(self) -> Outcome:
        """Random weights in the fold's shape."""
        target = self._target()
        return self._distilled(target, initial(target, torch.Generator().manual_seed(self.seed)))

    def shrink(self) -> Outcome:
        """One expert, folded into the shape that the fold of all took."""
        return self._plain_fold(self.experts[:1], self.texts([0], self.good))

    def placebo(self) -> Outcome:
        """All but the anchor shuffled."""
        experts = []
        for k in self.part:
            folder = self._scratch / f"shuffled-{k}"
            path = modular.shuffled(self.experts[k].path, folder, self.seed + k) if k else self.experts[k].path
            experts.append(modular.opened(path, self.device))
        return self._plain_fold(experts, self.texts(self.part, self.good))

    def rival(self, method: Any) -> Outcome:
        """In the fold's shape, on the fold's rows; every expert speaks for the task that it was trained on."""
        everyone = range(len(self.experts))
        make = table.merged_by(method, self.experts, 0, self.texts(everyone, self.meant), self.seed)
        target = self._target()  # if nobody has folded yet, it is done here: none of the method's operations
        with Products() as products:
            target, weights, note = fitting(make, target, [e.spec for e in self.experts], self.family)
        outcome = self._outcome(target, weights, flops=products.flops)
        outcome.notes = note
        return outcome

    def peer(self, name: str, scale: float = 1.0) -> Outcome:
        """The experts as they are; they have no base, so nothing is scaled."""
        del scale
        folder = peer.merge(name, [e.path for e in self.experts], self._scratch / name, seed=self.seed)
        made = modular.opened(folder, self.device)
        return Outcome(
            self._measured(made), made.parameters, table.size_of(made.spec), peak_bytes=children_peak(self.device)
        )

    # ------------------------------------------------------------------ parts

    def _folded(self) -> tuple[Path, Outcome]:
        return self.shared.model("fold", self._fold)

    def _fold(self, folder: Path) -> Outcome:
        self.progress("fold")
        done, weights, flops = self._make(self.settings.fold)
        choice = done.choice
        tokens.save(folder, self.family, choice.target, weights, self.experts[0])
        extra = {"knobs": vars(choice.knobs), "balance": choice.balance, "divergence": done.excess}
        return self._judged(folder, choice.target, flops=flops, extra=extra | {"trials": choice.trials})

    def _make(self, settings: folding.Settings) -> tuple[folding.Folded, Weights, int]:
        """A fold of the experts that are good at something."""
        experts, texts = [self.experts[k] for k in self.part], self.texts(self.part, self.good)
        return folded(experts, self.family, self.shapes(), texts, settings, self.seed, self.progress)

    def _target(self) -> Spec:
        """The shape that the fold chose."""
        return Source(self._folded()[0]).spec

    def _plain_fold(self, experts: Sequence[Source], texts: Calibration) -> Outcome:
        """A fold of other experts in the shape that the fold took."""
        target = self._target()
        _, weights, flops = folded(experts, self.family, [target], texts, self.settings.fold, self.seed, self.progress)
        return self._outcome(target, weights, flops=flops)

    def _training(self, parameters: int, steps: int, *, fused: bool = False) -> int:
        """Operations of a distillation at every learning rate; `fused`: every expert reads every task."""
        settings, sizes = self.settings.distil, [e.parameters for e in self.experts]
        readers = {t: sum(sizes) if fused else sizes[self.owner[t]] for t in self.splits}
        taught = [(readers[t], 3 * len(split.train)) for t, split in self.splits.items()]
        return training_flops(parameters, steps * settings.batch * 3, runs=len(settings.lrs), teachers=taught)

    def _steps(self, target: Spec, spare: int) -> int:
        """Steps of a distillation that takes so many operations more than the case's."""
        steps = self.settings.distil.steps
        return steps + max(0, round(steps * spare / self._training(plan.parameters(self.family, target), steps)))

    def _single(self, k: int) -> Outcome:
        source = self.experts[k]
        return Outcome(self.table[k], source.parameters, table.size_of(source.spec), notes=self.detail.experts[k].name)

    def _mixed(self, weights: Callable[[Tensor], Tensor], notes: str) -> Outcome:
        """Σ_k w_k p_k at the answer; `weights`: log w (row, expert) of rows of three tokens."""
        tests = {task: split.test for task, split in self.splits.items()}
        scores = tokens.mixture_accuracy(self.experts, tests, weights)
        return Outcome(scores, sum(self.expert_parameters.values()), notes=notes)

    def _distilled_anchor(
        self, lessons: Mapping[str, Lesson], steps: int | None = None, *, fused: bool = False
    ) -> Outcome:
        """The padded anchor, distilled."""

        def padded(target: Spec) -> Weights:
            return gathered(pad(self.experts[0], target, torch.Generator().manual_seed(self.seed)))

        target, weights, note = fitting(padded, self._target(), [self.experts[0].spec], self.family)
        outcome = self._distilled(target, weights, lessons=lessons, steps=steps, fused=fused)
        outcome.notes = "; ".join(filter(None, (outcome.notes, note)))
        return outcome

    def _distilled(
        self,
        target: Spec,
        weights: Weights,
        reused: tuple[float, float] = (0.0, 0.0),
        lessons: Mapping[str, Lesson] | None = None,
        steps: int | None = None,
        *,
        fused: bool = False,
    ) -> Outcome:
        """Distil from the owners and measure; the controls are given the fold's shape for nothing."""
        settings = self.settings.distil
        settings = replace(settings, steps=steps or settings.steps)
        self.progress(f"distil, {settings.steps} steps at {len(settings.lrs)} learning rates")
        done: Distilled = distil(
            target, weights, lessons or self.lessons(), self.validation, settings, self.seed, device=self.device
        )
        outcome = self._outcome(target, done.weights, reused=reused, extra={
            "curve": done.curve, "lr": done.lr, "lr_trials": done.trials, "best_step": done.best_step,
            "step_val_acc_99": done.first_99,
        })  # fmt: skip
        outcome.steps, outcome.tokens = settings.steps, settings.steps * settings.batch * 3
        size = plan.parameters(self.family, target)
        outcome.flops = self._training(size, settings.steps, fused=fused)
        outcome.notes = f"learning rate {done.lr:g} of {len(settings.lrs)} tried, best state at step {done.best_step}"
        return outcome

    def _outcome(self, target: Spec, weights: Mapping[int | None, Mapping[str, Tensor]], **facts: Any) -> Outcome:
        """Write the model as a Hugging Face folder, and `_judged`."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as place:
            folder = Path(place) / "model"
            tokens.save(folder, self.family, target, weights, self.experts[0])
            return self._judged(folder, target, **facts)

    def _judged(
        self,
        folder: Path,
        target: Spec,
        *,
        reused: tuple[float, float] = (0.0, 0.0),
        flops: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """What transformers makes of a model."""
        tests = {task: split.test for task, split in self.splits.items()}
        scores = tokens.accuracy(folder, tests, self.device)
        held = tokens.accuracy(folder, self.validation, self.device)
        more = {"validation": held, "step_val_acc_99": 0 if min(held.values()) > 0.99 else None}  # noqa: PLR2004
        size, extra = table.size_of(target), more | dict(extra or {})
        return Outcome(scores, plan.parameters(self.family, target), size, flops=flops, reused=reused, extra=extra)


def _answers(expert: Source, rows: Tensor, device: str) -> Tensor:
    """An expert's logits at the third token (row, vocab)."""
    return torch.cat([expert.logits(part[:, :3].to(device))[:, -1].cpu() for part in rows.split(1024)])
