"""What is compared: our methods, the controls, and every rival in `methods/`; one table for all suites.

A suite gives a *bed*: the experts of one case with all that is measured on them. A method is a name in `METHODS` and a
method of the bed. A rival is a module of `polymerge.methods` with a class `Method`; it is found by itself and run by
the bed's `rival`, in the shape that the fold was given.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from polymerge import methods as package
from polymerge import plan as planning
from polymerge._suggest import unknown
from polymerge.bench import peer
from polymerge.bench.answers import Weights
from polymerge.bench.rows import ranked
from polymerge.calibrate.calibration import Calibration
from polymerge.errors import PolymergeError, PreflightError
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec

METHODS: dict[str, tuple[str, str]] = {
    "expert": ("baseline", "the architecture trained from scratch on its task"),
    "union": ("ours", "all experts whole, mixed by the Bayesian gate"),
    "fold": ("ours", "closed form into one model, nothing trained end to end"),
    "fold_heal": ("ours", "the fold, then a short distillation from the owners"),
    "fold_heal_more": ("ours", "a lean fold, then a long distillation: as many FLOPs as fold and healing together"),
    "anchor": ("control", "the anchor alone"),
    "best_expert": ("control", "the single expert whose worst skill is best"),
    "ensemble": ("control", "mean of the experts' probabilities"),
    "anchor_distill": ("control", "the anchor padded to the same size, distilled on the same tokens"),
    "anchor_distill_more": ("control", "the same on more tokens: as many FLOPs as fold and healing together"),
    "scratch_distill": ("control", "the same size from random weights, distilled on the same tokens"),
    "shrink": ("control", "the fold of the anchor alone into the same size"),
    "placebo": ("control", "the fold with the other experts' weights shuffled inside each tensor"),
    "fuse_distill": ("rival", "FuseLLM: the padded anchor, distilled from the experts' fused distributions"),
}
"""Name -> (group, what it is). Rivals are added by `known`."""
TUNED = ("task_vector_transport",)
"""What adds differences to a base, and so needs the models that the experts were tuned from (`Bed.bases`)."""
PUBLIC = {
    "fuse_distill": ("18907305772/FuseAI@7d9a307", "the gradient of its loss"),
    "git_rebasin": ("samuela/git-re-basin@ef40098", "the permutations that weight matching finds"),
    "zipit": ("gstoica27/ZipIt@1b6ca40", "which units are joined"),
    "ot_fusion": ("graldij/transformer-fusion@204ae23", "the plans, and a map fused by them"),
    "orthogonal": ("antoniohonsell/Generalized-LMC-for-Transformers@8c6f323", "the rotation, and which heads match"),
    "regmean": ("nthehai01/RegMean-plusplus@8f4bf1f", "the regression of a map"),
    "fs_merge": ("idankinderman/fs_merge@53a74b4", "how learned maps are folded into a weight"),
    "task_vector_transport": ("apanariello4/merge-and-rebase@345c570", "how a difference is carried over"),
    "transport_and_merge": (
        "chenhangcuisg-code/Cross-Architecture-Merging-for-Large-Language-Models@6a822ef",
        "the whole merge, its plans not sparsified",
    ),
}  # fmt: skip
"""Public code that a rival was run beside, and what gave the same numbers (`tests/test_public_code.py`)."""


@dataclass
class Outcome:
    """What one method gave: test scores by skill, and what it took beside the time that the runner measures.

    `reused`, `reused_flops`: (wall, CPU) seconds and operations of shared work that count here as well, once for all
    settings that are tried. `peak_bytes`: of shared work and of other processes that count here as well.
    """

    scores: dict[str, float]
    parameters: int | None = None
    size: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    flops: int | None = None
    notes: str = ""
    reused: tuple[float, float] = (0.0, 0.0)
    reused_flops: int = 0
    peak_bytes: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Bed(Protocol):
    """The experts of one case, loaded; beside these attributes it has a method for every name it can do."""

    metric: str
    owners: dict[str, float]
    anchor_scores: dict[str, float]
    expert_parameters: dict[str, int]
    budget: str
    setting: dict[str, Any]
    shared: Any
    """`shared.Shared`: models that several methods use."""
    tries: Mapping[str, int]
    """How many of a rival's settings are tried, by its name; of others all."""
    bases: tuple[str, ...]
    """The model that each expert was tuned from; empty where they were trained from scratch."""

    def rival(self, method: Any) -> Outcome:
        """Run a rival in the fold's shape."""

    def peer(self, name: str, scale: float = 1.0) -> Outcome:
        """Run a method of mergekit on the experts' folders; `scale`: of a task vector."""


@dataclass(frozen=True)
class Case:
    """One line of a suite's list: a name, what it needs, and the methods that make sense for it (None: all)."""

    name: str
    protocol: str
    detail: Any
    methods: tuple[str, ...] | None = None


def rivals() -> dict[str, Any]:
    """Rival methods by name: the modules of `polymerge.methods` that have a class `Method`."""
    found = {name: importlib.import_module(f"{package.__name__}.{name}") for name in package.names()}
    return {name: module.Method for name, module in found.items() if hasattr(module, "Method")}


def known() -> dict[str, tuple[str, str]]:
    """All methods: name -> (group, what it is)."""
    others = rivals()
    about = {
        name: (cls.__doc__ or importlib.import_module(cls.__module__).__doc__ or "") for name, cls in others.items()
    }
    return (
        METHODS
        | peer.METHODS
        | {n: ("rival", text.strip().split("\n")[0]) for n, text in about.items() if n not in METHODS}
    )


def chosen(asked: Sequence[str] | None) -> list[str]:
    """The methods to run, in the table's order. Raises PolymergeError for an unknown name."""
    names = list(known())
    for name in asked or ():
        if name not in names:
            raise PolymergeError(unknown("method", name, names))
    return [name for name in names if not asked or name in asked]


def run(bed: Bed, name: str) -> Outcome:
    """One method on a bed. Raises PreflightError where it cannot do the case."""
    if name in TUNED and not bed.bases:
        raise PreflightError("it needs the donor's base model, and these experts were trained from scratch")
    if name in METHODS:
        work = getattr(bed, name, None)
        if work is None:
            raise PreflightError(f"{name}: this suite has no such run")
        outcome: Outcome = work()
    elif name in peer.METHODS:
        outcome = best_of(bed, {words: partial(bed.peer, name, scale) for words, scale in peer.tries(name).items()})
    else:
        outcome = tuned(bed, rivals()[name], bed.tries.get(name))
    if name in PUBLIC:
        outcome.notes = "; ".join(filter(None, (outcome.notes, "checked beside {}: {}".format(*PUBLIC[name]))))
    return outcome


def tuned(bed: Bed, method: Any, most: int | None = None) -> Outcome:
    """A rival at the best of its settings: options that differ from the defaults, its `GRID` or `grid(experts)`.

    `most`: how many of them are tried; None: all.
    """
    given = {"bases": bed.bases} if hasattr(method, "bases") else {}
    grid: Sequence[dict[str, Any]] = getattr(method, "GRID", ({},))
    if hasattr(method, "grid"):
        grid = method.grid(len(bed.expert_parameters))
    made = [method(**given, **options) for options in grid[:most]]
    return best_of(bed, {_settings(one): partial(_rival, bed, one) for one in made})


def _rival(bed: Bed, method: Any) -> Outcome:
    outcome = bed.rival(method)
    outcome.tokens = getattr(method, "training_tokens", 0)
    return outcome


def best_of(bed: Bed, tries: Mapping[str, Callable[[], Outcome]]) -> Outcome:
    """The best of what a method was tried with, in words, by its worst skill.

    The skills are measured on validation data, as `Outcome.extra["validation"]` has them: accuracy, or bits per byte
    over the owner's. The time and the operations of all trials are the method's.
    """
    up, found = 1 if bed.metric == "accuracy" else -1, []
    for words, work in tries.items():
        outcome = work()
        tried = f"best of {len(tries)} by validation" if len(tries) > 1 else ""
        outcome.notes = "; ".join(filter(None, (words, tried, outcome.notes)))
        found.append(outcome)
    if len(found) == 1:
        return found[0]
    spent = [outcome.flops for outcome in found if outcome.flops is not None]
    losses = [max(ranked(-up * score) for score in outcome.extra["validation"].values()) for outcome in found]
    best = found[min(range(len(found)), key=losses.__getitem__)]
    best.flops = sum(spent) if spent else None
    best.reused = max(outcome.reused for outcome in found)
    best.reused_flops = max(outcome.reused_flops for outcome in found)
    best.peak_bytes = max(outcome.peak_bytes for outcome in found)
    return best


def _settings(method: Any) -> str:
    """A rival's settings in words."""
    given = vars(method) if hasattr(method, "__dict__") else {}
    said = [f"{k} {v}" for k, v in given.items() if k not in ("weights", "bases") and not k.startswith("_")]
    if "weights" in given:
        said.insert(0, f"weights {', '.join(map(str, given['weights']))}" if given["weights"] else "equal weights")
    return ", ".join(said)


def holding(family: Family, experts: Sequence[Spec], target: Spec) -> Spec:
    """A shape that holds each expert: their largest width, heads and depth, and what the budget leaves for neurons.

    For controls and rivals that cannot go below an expert's sizes. It has at most the target's parameters or, where
    that holds no such shape, the least there is: in the method's favour. One expert keeps its head size.
    """
    budget, heads = planning.parameters(family, target), max(e.heads for e in experts)
    ratio = target.heads // target.kv_heads
    heads = math.ceil(heads / ratio) * ratio
    width = planning.allowed(family, max(e.width for e in experts), heads)
    base = replace(target, width=width, heads=heads, kv_heads=heads // ratio)
    if len(experts) == 1:
        [one] = experts
        base = replace(
            base, kv_heads=one.kv_heads, head_size=one.head_size, frequencies=one.frequencies,
            rope_scale=one.rope_scale, rope_theta=one.rope_theta,
        )  # fmt: skip
    least, mlp = max(e.layers for e in experts), max(e.mlp for e in experts)
    for layers in range(max(target.layers, least), least - 1, -1):
        empty = replace(base, layers=layers, mlp=0)
        rest = budget - planning.parameters(family, empty)
        neurons = rest // (planning.parameters(family, replace(empty, mlp=1)) - planning.parameters(family, empty))
        if neurons >= mlp:
            return replace(empty, mlp=neurons)
    return replace(base, layers=least, mlp=mlp)


def own_size(spec: Spec, target: Spec, family: Family) -> Spec:
    """An expert's layers, width, heads and neurons in the target's family; a dimension more where it has constants."""
    ratio = target.heads // target.kv_heads
    heads = math.ceil(spec.heads / ratio) * ratio
    width = planning.allowed(family, spec.width + spec.has_constants, heads)
    return replace(target, layers=spec.layers, width=width, heads=heads, kv_heads=heads // ratio, mlp=spec.mlp)


def fitting(
    make: Callable[[Spec], Weights], target: Spec, holds: Sequence[Spec], family: Family
) -> tuple[Spec, Weights, str]:
    """Make a model in the fold's shape or, where it cannot be, in another that holds `holds`; and what to say of it.

    Raises PreflightError where it cannot be made in that one either.
    """
    try:
        return target, make(target), ""
    except PreflightError as error:
        other, why = holding(family, holds, target), str(error)
    budget, given = (planning.parameters(family, spec) for spec in (target, other))
    note = f"another shape of as many parameters ({why})"
    if given > budget:
        note = f"given {given:,} parameters, more than the fold's {budget:,}: no shape of so few holds the experts"
    return other, make(other), note


def merged_by(
    method: Any, experts: Sequence[Source], anchor: int, texts: Calibration, seed: int
) -> Callable[[Spec], Weights]:
    """A rival as a function from the shape to the merged weights."""

    def merged(target: Spec) -> Weights:
        parts: list[tuple[int | None, dict[str, Tensor]]] = []
        method.merge(
            experts=experts, anchor=anchor, target=target, texts=texts, seed=seed,
            emit=lambda layer, some: parts.append((layer, some)),
        )  # fmt: skip
        return gathered(parts)

    return merged


def gathered(parts: Iterable[tuple[int | None, Mapping[str, Tensor]]]) -> Weights:
    """Parts of a model as they are emitted, by layer."""
    weights: Weights = {}
    for layer, some in parts:
        weights.setdefault(layer, {}).update(some)
    return weights


def size_of(spec: Spec) -> dict[str, Any]:
    """A shape as plain data."""
    keys = ("family", "layers", "width", "heads", "kv_heads", "head_size", "mlp")
    return {key: getattr(spec, key) for key in keys}
