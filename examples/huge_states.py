"""An expert with huge states at single tokens, as trained language models have them, merged with a usual one.

    python examples/huge_states.py [--times 50] [--fold tokens=32k refine=0 trials=false]

Massive activations (Sun et al. 2024) appear in models of billions of parameters, not in experts of one million. So they
are planted: in shakespeare's expert a neuron of the first MLP fires at line breaks and writes `--times` the usual size
of a state into one dimension, a neuron of the last MLP takes it away again, and the expert is tuned for 200 k tokens,
until it is nearly as good as before. Then it is folded with python's at the sum of their sizes. One JSON line in
`--out`: bits per byte over the owners on validation and test text, and what the expert lost by the planting. Texts:
`--texts` or POLYMERGE_TEXTS (docs/benchmark.md).
"""

import argparse
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from variant import settings_of

from polymerge import merge, recipe
from polymerge.bench import lm, text_experts
from polymerge.bench.machine import commit
from polymerge.calibrate.packing import pack
from polymerge.calibrate.tokenizer import load_tokenizer
from polymerge.evaluate import bits_per_byte
from polymerge.model.target import load_student
from polymerge.readers import VALIDATION_ROWS, rows_of

CONTEXT, SHARP, DIMENSION = 256, 20.0, 7
"""Tokens of a row; how steeply the planted neurons open; the dimension that they write to."""
TUNING = lm.Training(tokens=200_000, lr=5e-4)


def main() -> None:
    """Plant, tune, merge, measure."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--times", type=float, default=50.0, help="size of the planted states; 0: none")
    arguments.add_argument("--fold", nargs="*", default=[], metavar="KEY=VALUE", help="of a recipe's fold")
    arguments.add_argument("--texts", type=Path)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results/huge_states.jsonl")
    asked = arguments.parse_args()
    workshop = text_experts.Workshop(text_experts.texts_folder(asked.texts), 0, progress=print)
    plans = (text_experts.PLANS["shakespeare"], text_experts.PLANS["python/seed"])
    experts = {plan.domain: workshop.expert(plan) for plan in plans}
    with TemporaryDirectory() as scratch:
        folders = {name: one.folder for name, one in experts.items()}
        facts: dict[str, Any] = {}
        if asked.times:
            folders["shakespeare"], facts = planted(workshop, folders["shakespeare"], Path(scratch), asked.times)
        wanted = recipe.parse({
            "method": "fold", "anchor": "shakespeare", "dtype": "float32", "fold": settings_of(asked.fold),
            "size": {"params": sum(one.record["parameters"] for one in experts.values())},
            "experts": {n: {"model": str(folders[n]), "text": list(map(str, one.texts))} for n, one in experts.items()},
        })  # fmt: skip
        done = merge(wanted, Path(scratch) / "out")
        model, owners = load_student(Path(scratch) / "out"), {n: load_student(f) for n, f in folders.items()}
        rows = rows_of(
            {n: workshop.skill(n) for n in experts}, "validation", load_tokenizer(folders["shakespeare"]),
            wanted.fold.length, VALIDATION_ROWS,
        )  # fmt: skip
        held_out = {n: bits_per_byte(model, part) - bits_per_byte(owners[n], part) for n, part in rows.items()}
    row = {
        "commit": commit(), "times": asked.times, "fold": settings_of(asked.fold), "expert": facts,
        "validation": held_out, "test": {n: skill["fold"] - skill["owner"] for n, skill in done.skills.items()},
        "shape": done.shape, "cpu_seconds": done.cpu_seconds,
    }  # fmt: skip
    print(json.dumps(row))
    with asked.out.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def planted(workshop: text_experts.Workshop, source: Path, scratch: Path, times: float) -> tuple[Path, dict[str, Any]]:
    """A copy of a Llama with huge states at line breaks, tuned; what it lost, and the size of its states by layer."""
    tokenizer, model = load_tokenizer(source), load_student(source)
    documents = workshop.skill("shakespeare").calibration
    stream = lm.stream(tokenizer, [text for i, text in enumerate(documents) if i % text_experts.HELD_BACK])
    held_out = pack(tokenizer, documents[:: text_experts.HELD_BACK], CONTEXT, limit=text_experts.HELD_ROWS)
    breaks = torch.tensor([i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith("\n")])
    rows = stream[: 128 * CONTEXT].view(-1, CONTEXT)
    before = bits_per_byte(model, held_out)
    plant(model, rows, torch.isin(rows, breaks), times)
    after = bits_per_byte(model, held_out)
    record = lm.train(model, stream, held_out, TUNING, 0, progress=print)
    with torch.no_grad():
        states = model(rows, output_hidden_states=True).hidden_states[:-1]
    model.save_pretrained(scratch / "planted")
    tokenizer.save_pretrained(scratch / "planted")
    sizes = [{"median": float(s.norm(dim=-1).median()), "most": float(s.norm(dim=-1).max())} for s in states]
    lost = {"before": before, "planted": after, "tuned": record["best_val_bpb"]}
    return scratch / "planted", {"bits_per_byte": lost, "states": sizes}


@torch.no_grad()
def plant(model: Any, rows: Tensor, hit: Tensor, times: float) -> None:
    """Two neurons, in the places of the least used ones: one writes huge states where `hit` is, one takes them away."""
    first, last = model.model.layers[0], model.model.layers[-1]
    seen, states = heard(model, first.mlp, rows), heard(model, model.model.layers[1].input_layernorm, rows)
    sign, share = hit.float() * 2 - 1, hit.float().mean()
    weight = torch.where(hit, 1 / share, 1 / (1 - share))[..., None]
    gram = (seen * weight).flatten(0, 1).T @ seen.flatten(0, 1)
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    detector = torch.linalg.solve(gram, ((seen * weight) * sign[..., None]).sum((0, 1)))
    push = torch.zeros(states.shape[-1])
    push[DIMENSION] = times * states.norm(dim=-1).mean()
    _neuron(first.mlp, seen, detector, push, hit)
    norm = last.post_attention_layernorm
    seen, states = heard(model, last.mlp, rows), heard(model, norm, rows)
    detector = torch.zeros_like(push)
    detector[DIMENSION] = 1 / norm.weight[DIMENSION] / math.sqrt(len(push))  # 1 where a state is nothing else
    huge = states[..., DIMENSION] > 0.3 * push[DIMENSION]
    push[DIMENSION] = -states[huge][:, DIMENSION].mean()
    _neuron(last.mlp, seen, detector, push, huge)


def heard(model: Any, module: Any, rows: Tensor) -> Tensor:
    """What a module of the model reads on these rows."""
    found: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    model(rows)
    hook.remove()
    return found[0]


def _neuron(mlp: Any, seen: Tensor, detector: Tensor, push: Tensor, hit: Tensor) -> None:
    """silu(SHARP · detector · x) (detector · x), writing `push` on average where `hit` is."""
    used = (F.silu(mlp.gate_proj(seen)) * mlp.up_proj(seen)).pow(2).mean((0, 1))
    at = int((used * mlp.down_proj.weight.pow(2).sum(0)).argmin())
    mlp.gate_proj.weight[at], mlp.up_proj.weight[at] = SHARP * detector, detector
    said = seen @ detector
    mlp.down_proj.weight[:, at] = push / (F.silu(SHARP * said) * said)[hit].mean()


if __name__ == "__main__":
    main()
