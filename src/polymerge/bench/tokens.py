"""Rows of tokens that have no text behind them, of experts that answer at the third token only: for the tool's fold.

Only the last position's prediction means anything, so all is judged by KL(owner ‖ fold) there, on validation rows.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from polymerge.calibrate.calibration import Calibration
from polymerge.calibrate.ownership import by_prefix
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.methods._union_gate import BayesGate
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec
from polymerge.model.target import hf_config, load_student, sink, write_config


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
