"""What a fold costs as width, layers and calibration tokens grow: CPU seconds, operations, share of the matrix rate.

    python examples/cost.py [--out rows.jsonl]

Two experts of random weights, a Llama and a GPT-NeoX of one size, are folded side by side into one Llama of as many
layers, one and a half times as wide, on one thread; all knobs are given, so that nothing is tried. One of the three is
varied at a time, and blocks are refined for few steps: what a step costs does not depend on the tokens. Random weights
cost what trained ones do. One JSON line for each size.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matmul_rate import rate
from transformers import AutoConfig, AutoModelForCausalLM

from polymerge import families, threads
from polymerge.bench.flops import Products
from polymerge.bench.machine import peak, reset_peak
from polymerge.calibrate.calibration import gather
from polymerge.calibrate.packing import Rows
from polymerge.clock import Clock
from polymerge.methods import fold as folding
from polymerge.methods._layers import Knobs
from polymerge.methods._refine import Refine
from polymerge.model.source import Source

BASE = {"width": 128, "layers": 4, "tokens": 16_384}
VARIED = {"tokens": (8_192, 32_768), "layers": (2, 8), "width": (64, 256)}
VOCAB, LENGTH, HELD_OUT, HEAD = 1024, 128, 16, 32


def main() -> None:
    """The base, then each other value of each of the three."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="append the lines to this file too")
    asked = arguments.parse_args()
    sizes = [BASE] + [BASE | {name: value} for name, values in VARIED.items() for value in values]
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch, threads.fitting(1):
            line = json.dumps(size | measured(Path(scratch), **size))
        print(line, flush=True)
        if asked.out:
            with asked.out.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")


def measured(folder: Path, width: int, layers: int, tokens: int) -> dict[str, Any]:
    """Fold once; CPU seconds of the fold, its operations a second and their share of a large product's."""
    torch.manual_seed(0)
    experts = [random_expert(folder / kind, kind, width, layers) for kind in ("llama", "gpt_neox")]
    heads = 3 * width // 2 // HEAD
    target = replace(
        experts[0].spec, width=heads * HEAD, heads=heads, kv_heads=heads, mlp=6 * width, features=frozenset({"head"})
    )
    fitted, held_out = ([rows(count) for _ in experts] for count in (tokens // LENGTH, HELD_OUT))
    texts = gather(fitted, held_out, experts)
    settings = folding.Settings(asdict(Knobs()), Refine(steps=20, lr=2e-3))
    reset_peak("cpu")
    clock, before = Clock(), rate()
    with Products() as products:
        folding.fold(experts, families.get("llama"), [target], texts, settings, emit=_kept_nowhere, clock=clock)
    machine, seconds = (before + rate()) / 2, sum(clock.cpu_seconds.values())
    return {
        "cpu_seconds": clock.cpu_seconds, "gigaflop": products.flops / 1e9, "machine": machine / 1e9,
        "share": products.flops / seconds / machine, "peak_bytes": peak("cpu"),
    }  # fmt: skip


def random_expert(folder: Path, kind: str, width: int, layers: int) -> Source:
    """A checkpoint of random weights."""
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // HEAD,
        intermediate_size=4 * width if kind == "gpt_neox" else 8 * width // 3, max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Source(folder)


def rows(count: int) -> Rows:
    """Random tokens, as many bytes as tokens."""
    return Rows(torch.randint(VOCAB, (count, LENGTH)), count * LENGTH)


def _kept_nowhere(_target: Any) -> Any:
    return lambda *_: None


if __name__ == "__main__":
    main()
