"""The figures that the README claims for the shipped experts: fold, heal, and the padded anchor distilled alike.

    python examples/floors.py [--seeds 1] [--out examples/results/floors.jsonl]

At the sum of both experts' parameters and at the larger expert's: worst skill before and after healing with 400 k
tokens. The controls are the anchor padded without loss to the same number of parameters and distilled on the same
tokens, or trained on the text itself with no teacher. Learning rates of all are chosen on validation text from the same
grid with seed 0; other seeds keep them. One JSON line per run; all excesses are bits per byte over each skill's owner,
on test text.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from polymerge import heal as healing
from polymerge import plan, recipe, record, threads
from polymerge.bench.machine import commit
from polymerge.calibrate.texts import read_skill
from polymerge.calibrate.tokenizer import load_tokenizer
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.clock import Clock, peak_bytes
from polymerge.demo.corpus import write_heldout
from polymerge.demo.run import EXPERTS
from polymerge.evaluate import bits_per_byte
from polymerge.methods import fold as folding
from polymerge.methods._pad import pad
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec
from polymerge.model.target import hf_config, load_student, sink, write_config
from polymerge.progress import Quiet
from polymerge.readers import calibrate, load_expert, measure_experts, rows_of

RATES = (1e-3, 2e-3, 4e-3)
TOKENS = 400_000
METHODS = {"fold+heal": ("fold", None), "anchor+distil": ("anchor", None), "anchor+text": ("anchor", 1.0)}
"""What healing starts from, and the share of the text's own next tokens (None: teachers alone)."""


def holds_anchor(family: Family, target: Spec, anchor: Spec, budget: int) -> Spec:
    """A shape of the budget that holds the anchor whole: its own width and heads, layers and neurons as they fit."""
    for layers in (target.layers, anchor.layers):
        spec = replace(
            target, width=anchor.width, heads=anchor.heads, kv_heads=anchor.kv_heads, layers=layers, mlp=anchor.mlp
        )
        each = plan.parameters(family, replace(spec, mlp=1)) - plan.parameters(family, replace(spec, mlp=0))
        mlp = (budget - plan.parameters(family, replace(spec, mlp=0))) // each
        if mlp >= anchor.mlp:
            return replace(spec, mlp=mlp)
    return anchor


def main() -> None:
    """Run all cases; lines are appended as they come."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results/floors.jsonl")
    asked = arguments.parse_args()
    revision = commit()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    chosen: dict[tuple[str, str], float] = {}
    with asked.out.open("a", encoding="utf-8") as lines:
        for seed in range(asked.seeds):
            for size in ("sum", "1.0x"):
                for row in case(size, seed, chosen):
                    line = json.dumps({"commit": revision, **row})
                    print(line, flush=True)
                    lines.write(line + "\n")
                    lines.flush()


def case(size: str, seed: int, chosen: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Rows of one size: fold + heal, and the controls; rates that no seed has `chosen` yet are added to it."""
    with TemporaryDirectory() as scratch, threads.fitting(1):
        folder = Path(scratch)
        texts = write_heldout(folder / "text")
        sources = {name: Source(path) for name, path in EXPERTS.items()}
        sizes = {name: s.parameters for name, s in sources.items()}
        asked = recipe.parse({
            "method": "fold", "anchor": "prose", "seed": seed,
            "experts": {n: {"model": str(EXPERTS[n]), "text": str(texts[n])} for n in sources},
            "size": {"params": sum(sizes.values()) if size == "sum" else size},
        })  # fmt: skip
        skills = {n: read_skill(n, e.text, seed=seed) for n, e in asked.experts.items()}
        tokenizer = load_tokenizer(EXPERTS["prose"])
        shapes = plan.make(asked, {n: s.spec for n, s in sources.items()}, sizes)
        test = rows_of(skills, "test", tokenizer, 128, 512)
        owners = measure_experts(sources, test, 0.01, Quiet())
        clock = Clock()
        with CheckpointWriter(folder / "fold") as writer:
            done = folding.fold(
                list(sources.values()), shapes.family, shapes.shapes, calibrate(asked, sources, skills, tokenizer)[0],
                asked.fold, emit=lambda target: sink(shapes.family, target, writer), seed=seed, clock=clock,
            )  # fmt: skip
            write_config(writer, hf_config(shapes.family, done.choice.target, sources["prose"]), torch.float32)
        budget = plan.parameters(shapes.family, done.choice.target)
        padded = holds_anchor(shapes.family, done.choice.target, sources["prose"].spec, budget)
        with CheckpointWriter(folder / "anchor") as writer:
            emit = sink(shapes.family, padded, writer)
            for layer, weights in pad(sources["prose"], padded, torch.Generator().manual_seed(seed)):
                emit(layer, weights)
            write_config(writer, hf_config(shapes.family, padded, sources["prose"]), torch.float32)
        common = {"size": size, "seed": seed, "tokens": TOKENS, "versions": record.package_versions()}
        rows = []
        for method, (start_from, text) in METHODS.items():
            spec = done.choice.target if start_from == "fold" else padded
            best: dict[str, Any] | None = None
            for rate in [chosen[size, method]] if (size, method) in chosen else RATES:
                model = load_student(folder / start_from)
                before = {n: bits_per_byte(model, r) - owners[n]["owner"] for n, r in test.items()}
                start = time.process_time()
                outcome = healing.heal(
                    model, {n: load_expert(s) for n, s in sources.items()},
                    rows_of(skills, "calibration", tokenizer, 128), rows_of(skills, "validation", tokenizer, 128, 64),
                    healing.Heal(tokens=TOKENS, lr=rate, text=text, evaluate_every=13), seed=seed,
                )  # fmt: skip
                after = {n: bits_per_byte(model, r) - owners[n]["owner"] for n, r in test.items()}
                worst = min(p.worst for p in outcome.curve)
                found = {
                    "method": method, "lr": rate, "before": before, "after": after, "validation_worst": worst,
                    "curve": [(p.tokens, p.worst) for p in outcome.curve],
                    "heal_cpu_seconds": time.process_time() - start,
                    "parameters": plan.parameters(shapes.family, spec), "shape": record.shape(spec),
                    "knobs": vars(done.choice.knobs), "balance": done.choice.balance,
                    "fold_cpu_seconds": clock.cpu_seconds, "peak_bytes": peak_bytes(),
                }  # fmt: skip
                if best is None or worst < best["validation_worst"]:
                    best = found
            assert best is not None
            chosen[size, method] = best["lr"]
            rows.append({**common, **best})
        final = rows[1]["validation_worst"]
        reached = next((tokens for tokens, worst in rows[0]["curve"] if worst <= final), None)
        rows[0]["tokens_to_reach_control"] = reached
    return rows


if __name__ == "__main__":
    main()
