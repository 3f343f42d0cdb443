"""The fold on rows of tokens that have no text behind them: experts that answer at the third token only.

`fold.fold` chooses shape and knobs by the loss of the next token at every position, on few rows of many tokens. Here a
row has three tokens and only the last one's prediction means anything, so the choice is made by KL(owner ‖ fold) there,
on validation rows, by the same walk: shape first, then the knobs one at a time. The fold itself is the tool's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymerge.align.width import Basis, allot, residual_basis
from polymerge.bench.answers import Weights
from polymerge.calibrate.calibration import Calibration
from polymerge.calibrate.ownership import by_prefix
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.methods import _judge
from polymerge.methods import fold as folding
from polymerge.methods._layers import Knobs, LayerFold
from polymerge.methods._refine import Refine
from polymerge.methods._union_gate import BayesGate
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec
from polymerge.model.target import hf_config, load_student, sink, write_config

TILT, TILTS = 2.0, 3
"""Balance: the worst skill counts so many times more, at most so often."""

Tried = Callable[[Spec, Knobs, tuple[float, ...]], list[float]]
"""Shape, knobs, balance -> held-out divergence by expert."""


@dataclass(frozen=True)
class TokenFold:
    """Rows an expert for the basis and for trials; refinement of `steps` of `rows` rows a block.

    The rate is the delicate one: 2e-3 ruins some shapes, though `_refine.block` takes back what ends worse on rows held
    out (x÷y + x+y of 2 and 4 layers, width 256, x÷y: 0.943 in closed form, 0.541 after 200 steps at 2e-3).
    """

    basis_rows: int = 2048
    trial_rows: int = 2048
    trial_held_out: int = 512
    refine: Refine = field(default_factory=lambda: Refine(steps=200, rows=512, lr=1e-3, head_steps=60))
    batch: int = 2048


@dataclass
class FoldedTokens:
    """The folded model, its knobs and balance, held-out KL in nats by expert, and what was tried."""

    target: Spec
    weights: Weights
    knobs: Knobs
    balance: tuple[float, ...]
    divergence: list[float]
    trials: list[dict[str, Any]] = field(default_factory=list)


def calibration(
    fitted: Sequence[Tensor],
    held_out: Sequence[Tensor],
    owners: Sequence[int],
    experts: int,
) -> Calibration:
    """Rows (x, operation, y) of every skill, each with the expert that owns it; only the last position is scored."""
    parts = [
        (o, fit, r[:, :3])
        for group, fit in ((fitted, True), (held_out, False))
        for o, r in zip(owners, group, strict=True)
    ]
    tokens = torch.cat([r for _, _, r in parts])
    owner = torch.cat([torch.full((len(r),), o) for o, _, r in parts])
    fit = torch.cat([torch.full((len(r),), f) for _, f, r in parts])
    return Calibration(
        tokens=tokens,
        owner=owner,
        fit=fit,
        owned=by_prefix(tokens, owner, experts),
        scored=torch.tensor([False, False, True]),
        bytes_per_token=(1.0,) * experts,
    )


def fold_tokens(
    experts: Sequence[Source],
    family: Family,
    shapes: Sequence[Spec],
    texts: Calibration,
    settings: TokenFold,
    seed: int = 0,
) -> FoldedTokens:
    """Fold into the best of the shapes, knobs chosen on the rows that are held out."""
    bases = [
        residual_basis(
            e, texts.of(k)[: settings.basis_rows], texts.scored, torch.Generator().manual_seed(seed + k), batch=1024
        )
        for k, e in enumerate(experts)
    ]
    few = texts.subset(settings.trial_rows, settings.trial_held_out)
    quick = replace(settings.refine, steps=0, head_steps=20)
    trials: list[dict[str, Any]] = []

    def tried(spec: Spec, knobs: Knobs, balance: tuple[float, ...]) -> list[float]:
        found = _once(experts, family, spec, few, bases, knobs, balance, quick, settings.batch, seed).divergence
        size = {"width": spec.width, "heads": spec.heads, "mlp": spec.mlp}
        trials.append({**size, **vars(knobs), "balance": balance, "divergence": found})
        return found

    target, knobs, balance = shapes[len(shapes) // 2], Knobs(), (1.0,) * len(experts)
    if len(experts) > 1:
        target, knobs, balance = chosen(shapes, tried, bases)
    result = _once(experts, family, target, texts, bases, knobs, balance, settings.refine, settings.batch, seed)
    result.trials = trials
    return result


def chosen(shapes: Sequence[Spec], tried: Tried, bases: Sequence[Basis]) -> tuple[Spec, Knobs, tuple[float, ...]]:
    """Shape and knobs as `fold.choose` finds them, then balance."""
    balance = (1.0,) * len(bases)
    target, knobs, best = folding.search(
        shapes, Knobs(), folding.GRIDS, lambda spec, knobs: tried(spec, knobs, balance),
        lambda spec, knobs: allot(bases, spec.width, even=knobs.even),
    )  # fmt: skip
    for _ in range(TILTS):
        worst = best.index(max(best))
        tilted = tuple(b * (TILT if k == worst else 1.0) for k, b in enumerate(balance))
        if max(found := tried(target, knobs, tilted)) >= folding.BETTER * max(best):
            break
        best, balance = found, tilted
    return target, knobs, balance


def _once(
    experts: Sequence[Source],
    family: Family,
    target: Spec,
    texts: Calibration,
    bases: Sequence[Basis],
    knobs: Knobs,
    balance: tuple[float, ...],
    refine: Refine,
    batch: int,
    seed: int,
) -> FoldedTokens:
    weights: Weights = {}
    run = LayerFold(
        experts, target, texts, bases, knobs, refine, bias=family.bias, balance=balance, seed=seed, batch=batch
    )
    run.run(lambda layer, some: weights.setdefault(layer, {}).update(some))
    return FoldedTokens(target, weights, knobs, balance, _judge.divergence(run, weights[None]["head.weight"]))


def save(
    folder: Path, family: Family, spec: Spec, weights: Mapping[int | None, Mapping[str, Tensor]], anchor: Source
) -> None:
    """The model as a plain Hugging Face folder."""
    with CheckpointWriter(folder) as writer:
        emit = sink(family, spec, writer)
        for layer, part in weights.items():
            emit(layer, {role: w.detach().cpu() for role, w in part.items()})
        write_config(writer, hf_config(family, spec, anchor), torch.float32)


@torch.no_grad()
def accuracy(folder: Path, tests: Mapping[str, Tensor], device: str = "cpu") -> dict[str, float]:
    """Share of right answers of a Hugging Face folder on every skill, as transformers runs it."""
    model = load_student(folder).to(device)
    found = {}
    for name, rows in tests.items():
        right = 0
        for part in rows.split(1024):
            logits = model(input_ids=part[:, :3].to(device), use_cache=False).logits[:, -1]
            right += int((logits.argmax(-1).cpu() == part[:, 3]).sum())
        found[name] = right / len(rows)
    return found


@torch.no_grad()
def mixture_accuracy(
    experts: Sequence[Source], tests: Mapping[str, Tensor], weights: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Share of right answers of Σ_k w_k p_k on every skill; `weights`: rows of three tokens -> log w (row, expert)."""
    found = {}
    for name, rows in tests.items():
        right = 0
        for part in rows.split(1024):
            logs = torch.stack(
                [e.logits(part[:, :3].to(e.device))[:, -1].log_softmax(-1).cpu() for e in experts], dim=1
            )
            mixed = (logs.double() + weights(part[:, :3])[..., None]).logsumexp(1)
            right += int((mixed.argmax(-1) == part[:, 3]).sum())
        found[name] = right / len(rows)
    return found


def gate_weights(experts: Sequence[Source], rows: Tensor, alpha: float = 0.01) -> Tensor:
    """Log weights (row, expert) of the union's gate after rows of tokens."""
    evidence = torch.stack([e.log_probs(rows) for e in experts], dim=-1).double()
    gate = BayesGate(torch.full((len(experts),), 1 / len(experts), dtype=torch.float64), alpha)
    after: Tensor = gate.scan(gate.start(len(rows)), evidence, torch.ones(evidence.shape[:2], dtype=torch.bool))
    return after[:, -1]
