"""Suite `modular`: the seed experiment's tasks, by experts of different depth, width and heads, merged.

Two protocols: *same* (two experts of one task and different architecture, the seed's runs 1 to 4) and *cross* (experts
of different tasks, two or all four in one model); *baseline* is one architecture from scratch, the seed's run 0. Score:
share of right answers on test pairs. Experts are Llama models trained by `train.py`; they are build products, kept
in a cache folder under a hash of all that they depend on.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from polymerge import families
from polymerge.bench.distil import Distil
from polymerge.bench.locks import held
from polymerge.bench.methods import Case
from polymerge.bench.tasks import TASKS, Arithmetic
from polymerge.bench.train import Study, Trained, Training, together
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.methods import fold as folding
from polymerge.methods._refine import Refine
from polymerge.model.source import Source
from polymerge.model.spec import Spec
from polymerge.model.target import sink, write_config

RECIPE_VERSION = 2
"""Part of the cache's key: raise it when training changes in a way that the settings don't show."""

SHAPES = {"base": (2, 128, 4), "layers": (4, 128, 4), "width": (2, 256, 4), "heads": (2, 128, 8), "all": (4, 256, 8)}
"""The seed's architectures: (layers, width, heads) of the base and of what differs from it in runs 1 to 4."""
RUNS = {"layers": 1, "width": 2, "heads": 3, "all": 4}
BY_HEART = 1000
"""Updates after which an expert knows its training pairs and nothing else."""

FOLD = folding.Settings(
    refine=Refine(steps=200, rows=512, lr=1e-3, head_steps=60),
    trials=folding.Trials(rows=2048, held_out=512, refined_rows=2048, refined_held_out=512, many=1.0),
    basis_rows=2048,
    batch=2048,
)
"""Rows have three tokens: many of them. The rate is the delicate one: 2e-3 ruins some shapes, though `_refine.block`
takes back what ends worse on rows held out (x÷y + x+y of 2 and 4 layers, width 256, x÷y: 0.943 in closed form, 0.541
after 200 steps at 2e-3)."""


@dataclass(frozen=True)
class ExpertPlan:
    """An expert to train: a task, a shape, the share of pairs it sees, its weight decay.

    `updates`: the most it gets; None: as the profile says. One stopped early knows its training pairs and no others.
    """

    task: str
    layers: int
    width: int
    heads: int
    share: float = 0.5
    weight_decay: float = 0.5
    updates: int | None = None

    @property
    def name(self) -> str:
        """Such as x_div_y-2x128x4."""
        stopped = "" if self.updates is None else f"@{self.updates}"
        return f"{self.task}-{self.layers}x{self.width}x{self.heads}{stopped}"


@dataclass(frozen=True)
class Detail:
    """What a case merges. `budget`: "sum" or "largest" of the experts' parameters, or "union".

    `free`: any width that the fold finds best, else that of the widest expert.
    """

    experts: tuple[ExpertPlan, ...]
    budget: str = "sum"
    run: int | None = None
    free: bool = False


@dataclass(frozen=True)
class Settings:
    """Everything that a profile decides."""

    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    training: Training = field(default_factory=Training)
    fold: folding.Settings = FOLD
    distil: Distil = field(default_factory=Distil)


# Both stop training 200 updates after an expert generalises, and so share experts; the seed went on to update 7,500.
PROFILES = {
    "quick": Settings(
        fold=replace(FOLD, refine=replace(FOLD.refine, steps=60)),
        distil=Distil(steps=60, lrs=(3e-5, 3e-4, 1e-3)),
    ),
    "full": Settings(),
}


def expert(task: str, shape: str, updates: int | None = None) -> ExpertPlan:
    """A task at one of the seed's shapes. S5 has 14,400 pairs and needs more of them than half to be learned."""
    return ExpertPlan(task, *SHAPES[shape], share=0.8 if task == "permutation" else 0.5, updates=updates)


def cases(profile: str) -> list[Case]:
    """The cases of a profile, cheap ones first."""
    if profile == "quick":
        # Heads: two layers train soonest, and it is the one difference that mergekit does not refuse.
        tasks, kinds, pairs, budgets = ["x_plus_y"], ["heads"], [("x_div_y", "x_plus_y")], ["sum"]
        ends: dict[str, int | None] = {"": None}
    else:
        tasks, kinds, budgets = list(TASKS), list(RUNS), ["sum", "largest", "union"]
        ends = {"": None, "/by-heart": BY_HEART}
        pairs = [(a, b) for i, a in enumerate(TASKS) for b in TASKS[i + 1 :]]
    same = [
        Case(f"same/{task}/{kind}{end}", "same", Detail((expert(task, "base"), expert(task, kind, updates)), run=run))
        for task in tasks
        for kind, run in RUNS.items()
        if kind in kinds
        for end, updates in ends.items()
    ]
    cross = [
        Case(f"cross/{a}+{b}/{kind}/{budget}", "cross", Detail((expert(a, "base"), expert(b, kind)), budget))
        for budget in budgets
        for kind in kinds
        for a, b in pairs
    ]
    if profile == "full":
        four = tuple(expert(task, shape) for task, shape in zip(TASKS, ("base", "layers", "heads", "all"), strict=True))
        cross += [Case(f"cross/four/{budget}", "cross", Detail(four, budget, free=True)) for budget in budgets]
    plans = dict.fromkeys(plan for case in same + cross for plan in case.detail.experts if plan.updates is None)
    baseline = [Case(f"baseline/{plan.name}", "baseline", Detail((plan,)), ("expert",)) for plan in plans]
    return baseline + same + cross


def spec_of(plan: ExpertPlan, arithmetic: Arithmetic) -> Spec:
    """The Llama decoder of a plan: SwiGLU of 2.75 times the width, heads that divide it, no biases."""
    size = plan.width // plan.heads
    return Spec(
        family="llama", vocab=arithmetic.vocab, width=plan.width, layers=plan.layers, heads=plan.heads,
        kv_heads=plan.heads, head_size=size, mlp=plan.width * 11 // 4, norm="rms", eps=1e-6, activation="silu",
        gated=True, tied=False, max_positions=16,
        frequencies=tuple(10000.0 ** (-2 * i / size) for i in range(size // 2)), features=frozenset({"head"}),
    )  # fmt: skip


def cache_folder() -> Path:
    """Where experts are kept: POLYMERGE_CACHE, or the user's cache folder."""
    place = os.environ.get("POLYMERGE_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(place) / "polymerge-bench" if place else Path.home() / ".cache" / "polymerge-bench"


@dataclass(frozen=True)
class Order:
    """An expert of the cache, there or to be trained: its folder is named by a hash of all that it depends on."""

    plan: ExpertPlan
    settings: Settings
    seed: int
    cache: Path

    @property
    def training(self) -> Training:
        """The profile's, with what the plan changes."""
        mine, plan = self.settings.training, self.plan
        return replace(mine, weight_decay=plan.weight_decay, steps=plan.updates or mine.steps)

    @property
    def depends(self) -> dict[str, Any]:
        """All that it depends on."""
        asked = {key: value for key, value in asdict(self.plan).items() if key != "updates"}  # training's steps tell it
        return {
            "version": RECIPE_VERSION, "plan": asked, "seed": self.seed,
            "training": asdict(self.training), "arithmetic": asdict(self.settings.arithmetic),
        }  # fmt: skip

    @property
    def folder(self) -> Path:
        """Of the checkpoint and its record."""
        text = json.dumps(self.depends, sort_keys=True)
        return self.cache / f"{self.plan.name}-s{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def record(self) -> Path:
        """What training gave; the expert is there when it is."""
        return self.folder / "training.json"

    @property
    def lock(self) -> Path:
        """Held by the process that trains it."""
        return self.cache / f".{self.folder.name}.lock"


def orders(cases: Sequence[Case], settings: Settings, seeds: int, cache: Path) -> list[Order]:
    """The experts of some cases, for seeds 0, 1, … below `seeds`."""
    plans = dict.fromkeys(plan for case in cases for plan in case.detail.experts)
    return [Order(plan, settings, seed, cache) for seed in range(seeds) for plan in plans]


def trained(
    plan: ExpertPlan,
    settings: Settings,
    seed: int,
    *,
    cache: Path,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Path, dict[str, Any]]:
    """(folder, what training it gave) of an expert; trained now unless the cache has it."""
    order = Order(plan, settings, seed, cache)
    with held(order.lock):  # another process may be training it
        if not order.record.is_file():
            _train([order], device, lambda note: progress(f"{plan.name}: {note}"))
    return order.folder, json.loads(order.record.read_text(encoding="utf-8"))


def train_stacks(orders: Sequence[Order], *, device: str, progress: Callable[[str], None] = lambda _: None) -> None:
    """Train what the cache lacks and no other process is at, all experts of one shape side by side: for a GPU."""
    stacks: dict[Any, list[Order]] = {}
    for order in dict.fromkeys(orders):
        stacks.setdefault((spec_of(order.plan, order.settings.arithmetic), order.training), []).append(order)
    for stack in stacks.values():
        with ExitStack() as locks:
            with held(stack[0].cache / ".stacks.lock"):  # one process claims at a time, so that stacks stay whole
                mine = [order for order in stack if locks.enter_context(held(order.lock, wait=False))]
            if lacking := [order for order in mine if not order.record.is_file()]:
                title = f"{len(lacking)} experts as {lacking[0].plan.name}"
                _train(lacking, device, lambda note, title=title: progress(f"{title}: {note}"))  # type: ignore[misc]


def _train(orders: Sequence[Order], device: str, progress: Callable[[str], None]) -> None:
    """Train experts of one shape together, and keep them."""
    first = orders[0]
    splits = [order.settings.arithmetic.split(order.plan.task, order.seed, order.plan.share) for order in orders]
    studies = [Study(s.train, s.validation, order.seed) for s, order in zip(splits, orders, strict=True)]
    spec = spec_of(first.plan, first.settings.arithmetic)
    made = together(spec, studies, first.training, device=device, progress=progress)
    for order, done in zip(orders, made, strict=True):
        _keep(order.folder, order.plan, order.settings.arithmetic, done, order.depends)


def _keep(folder: Path, plan: ExpertPlan, arithmetic: Arithmetic, done: Trained, depends: dict[str, Any]) -> None:
    """Write an expert as a Hugging Face folder, with the record of its training."""
    from transformers import AutoConfig

    spec, family = spec_of(plan, arithmetic), families.get("llama")
    assert family.write is not None
    config = AutoConfig.for_model("llama", **family.write(spec), bos_token_id=None, eos_token_id=None)
    config.architectures = [family.architecture]
    with CheckpointWriter(folder) as writer:
        emit = sink(family, spec, writer)
        for layer, weights in done.weights.items():
            emit(layer, {role: w.detach().cpu() for role, w in weights.items()})
        write_config(writer, config, torch.float32)
        writer.text("training.json", json.dumps(done.summary() | {"depends": depends}, indent=1) + "\n")


def shuffled(source: Path, folder: Path, seed: int) -> Path:
    """A copy of a checkpoint with the entries of every tensor in random order: its statistics without its knowledge."""
    from polymerge.checkpoint.reader import Checkpoint

    checkpoint, generator = Checkpoint(source), torch.Generator().manual_seed(seed)
    with CheckpointWriter(folder) as writer:
        for name in checkpoint.names:
            tensor = checkpoint.tensor(name)
            order = torch.randperm(tensor.numel(), generator=generator)
            writer.add(name, tensor.flatten()[order].view(tensor.shape))
        writer.copy(source / "config.json")
    return folder


def opened(folder: Path, device: str) -> Source:
    """An expert of the cache."""
    return Source(folder, device=device)
