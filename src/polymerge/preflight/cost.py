"""What a merge needs: memory, disk and time, estimated from shapes before anything runs.

N tokens in R rows of T; target: width d, layers L, vocabulary V, parameters P; K experts of width d_k, layers
L_k, parameters P_k; M = Σ mlp_k.

    states    4 R T (3 d + Σ (2 n_k + 1) d_k)   float32, all rows; n_k layers of an expert in one of the target's
    moments   24 (K M² + d² + d V)      float64 second moments and their factors
    bases     32 Σ (2 L_k + 1) d_k²     float64, Fisher matrices per block boundary
    logits    3 · 4 · 32 T V            one batch
    outer     8 V (Σ d_k + d)           embeddings and heads; layers come one at a time
    heal      4 (5 P + Σ P_k)           weights, gradients, Adam's two moments, best state; teachers
    basis     8 · rows · T · Σ P_k
    fold      2 N (Σ P_k + P + L (K (3 d² + M² + H²) + 4 d (M + H)) + V (d + Σ d_k))   H: width of all heads
    choose    the same for the rows of the trials, and their refinement
    refine    8 · steps · rows · T · P
    heal      1.3 · tokens · (6 P + 2 mean P_k)               measuring on the way included
    evaluate  2 N' (Σ P_k + 2 P)                              N': tokens of the test text

Time is these operations over `SHARE` times the speed of a matrix product, measured on the spot: the part that
kernels of small models reach. Good to a factor of about two. What experts write is not in it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polymerge import threads
from polymerge.align import depth
from polymerge.methods._experts import kept
from polymerge.methods.fold import GRIDS, Settings
from polymerge.model.source import Source
from polymerge.plan import Plan
from polymerge.plan import parameters as count
from polymerge.recipe import LEAN, Recipe

BATCH = 32
LIBRARIES = 700_000_000
"""Bytes of a process that has imported torch and transformers, and of what its allocator keeps."""
SHARE = 0.5
"""Measured over the demo (two models of a million parameters) on one core, beside another run."""
NARROW, WIDE = 512, 2048
"""Rows of the product that measures the machine. Beside other work, threads wait longer for each other than a small one
takes: two on two cores, one of them busy, reached 16 GFLOP/s by 512 rows and 66 by 2,048."""


@dataclass(frozen=True)
class Cost:
    """parameters: of the result, at most; bytes; stages: seconds of each, named as a merge's record names them.

    `work_bytes`: of the fold in float32 and of healing's state, which lie on disk until the merge is done.
    `lean_seconds`: with `fold: lean`; None where nothing is folded.
    """

    parameters: int
    memory_bytes: int
    disk_bytes: int
    work_bytes: int
    stages: dict[str, float]
    lean_seconds: float | None = None


def estimate(recipe: Recipe, sources: Mapping[str, Source], plan: Plan | None, rows: Mapping[str, int]) -> Cost:
    """Memory, disk and time of a recipe (formulas above); `rows`: of each part of the texts, all skills together."""
    specs = [s.spec for s in sources.values()]
    experts = sum(s.parameters for s in sources.values())
    widths, length = sum(s.width for s in specs), recipe.fold.length
    vocab = max(s.vocab for s in (*specs, *(plan.shapes if plan else ())))
    each = getattr(torch, recipe.dtype).itemsize
    files = (f for s in sources.values() for f in s.checkpoint.tokenizer_files())
    beside = sum(f.stat().st_size for f in files) + 200_000  # one expert's tokenizer, or all in one
    widest = max(s.width for s in specs)
    with threads.fitting(widest):  # as the merge has them
        rate = SHARE * speed(_device(sources), NARROW if widest <= threads.SMALL else WIDE)
    measured = rows["test"] * length
    scoring = 4 * (measured * max(s.width for s in specs) + 3 * BATCH * length * vocab + 2 * vocab * widths)
    if plan is None:
        stages = {"evaluate": 2.0 * measured * experts / rate}
        return Cost(experts, LIBRARIES + scoring, experts * each + beside, 0, stages)
    target = max(plan.shapes, key=lambda s: count(plan.family, s))
    size = count(plan.family, target)
    read = (rows["calibration"] + rows["validation"]) * length
    mlp = sum(depth.most(s.layers, target.layers) * s.mlp for s in specs)
    folding = (
        4 * read * kept(specs, target)
        + 24 * (len(specs) * mlp**2 + target.width * (target.width + vocab))
        + 32 * sum((2 * s.layers + 1) * s.width**2 for s in specs)
        + 12 * BATCH * length * vocab
        + 8 * vocab * (widths + target.width)
    )
    healing = 4 * (5 * size + experts) + 16 * (
        recipe.heal.batch_rows * recipe.heal.length * vocab if recipe.heal else 0
    )
    memory = LIBRARIES + max(folding, scoring, healing if recipe.heal else 0)
    scored = 2.0 * measured * (experts + 2 * size)
    spent = _work(recipe, sources, plan, size, read) | {"evaluate": scored}
    lean = None
    if recipe.method == "fold":
        less = min(rows["calibration"], len(specs) * LEAN["tokens"] // length) + rows["validation"]
        spare = recipe.model_copy(update={"fold": recipe.fold.model_copy(update=LEAN)})
        lean = (sum(_work(spare, sources, plan, size, less * length).values()) + scored) / rate
    stages = {stage: operations / rate for stage, operations in spent.items() if operations}
    work = (4 + 16 * (recipe.heal is not None)) * size
    return Cost(size, memory, size * each + beside, work, stages, lean)


def _work(recipe: Recipe, sources: Mapping[str, Source], plan: Plan, size: int, tokens: int) -> dict[str, float]:
    """Floating-point operations of basis, trials, fold, refinement and healing."""
    specs = [s.spec for s in sources.values()]
    experts, k = sum(s.parameters for s in sources.values()), len(specs)
    target = plan.shapes[len(plan.shapes) // 2]
    stacked = [(depth.most(s.layers, target.layers), s) for s in specs]
    heads, mlp = sum(n * s.heads for n, s in stacked) * target.head_size, sum(n * s.mlp for n, s in stacked)
    moments = target.layers * (3 * k * target.width**2 + k * (mlp**2 + heads**2) + 4 * target.width * (mlp + heads))
    one = 2.0 * (experts + size + moments + target.vocab * (target.width + sum(s.width for s in specs)))
    settings = Settings.of(recipe.fold)
    tried, knobs = settings.trials, len(GRIDS) - len(settings.given)
    refined = min(3, len(plan.shapes)) + (knobs > 0)  # what few rows chose, a neighbour on each side, knobs as at first
    texts = tokens // recipe.fold.length
    step = 8.0 * settings.refine.rows * recipe.fold.length * size
    choosing = 0.0
    if k > 1 and tried is not None:
        rows = (1 + len(plan.shapes) // 2 + knobs) * (tried.rows + tried.held_out)
        rows += refined * (tried.refined(k) + tried.refined_held_out)
        choosing = one * k * rows * recipe.fold.length
        choosing += refined * settings.refine.most(min(tried.steps, recipe.fold.refine), texts, k) * step
    return {
        "basis": 8.0 * min(settings.basis_rows, texts // k) * recipe.fold.length * experts,
        "choose": choosing,
        "fold": one * tokens,
        "refine": settings.refine.most(recipe.fold.refine, texts, k) * step,
        "heal": 1.3 * recipe.heal.tokens * (6.0 * size + 2.0 * experts / k) if recipe.heal else 0.0,
    }


def _device(sources: Mapping[str, Source]) -> str:
    return next(iter(sources.values())).device


def speed(device: str, n: int = NARROW, seconds: float = 0.05) -> float:
    """Floating-point operations per second of a float32 product of n × n, measured for `seconds` at least."""
    x = torch.ones(n, n, device=device)
    _ = float((x @ x)[0, 0])
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        _ = float((x @ x)[0, 0])  # reading a value waits for a GPU
        done += 1
    return max(1, done) * 2.0 * n**3 / spent
