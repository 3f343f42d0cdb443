"""How experts of every family fold: one Python expert, trained anew in each, merged with Shakespeare's.

    python examples/families.py llama gemma3_text olmo2

Shakespeare's is a llama of 4 layers and width 96, Python's has the same sizes in the family named (docs/benchmark.md,
`python/seed`); all have one tokenizer. They are merged at the sum of their sizes. Each family adds one JSON line to
`--out`: what both skills lost, in bits per byte over their owners on test text, and how good those are. Experts are
trained when they are first needed, from the texts that `--texts` or POLYMERGE_TEXTS names.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from variant import settings_of

from polymerge import merge, recipe
from polymerge.bench import text_experts
from polymerge.bench.machine import commit


def main() -> None:
    """Train, merge, and add a row for each family."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("families", nargs="+", help="of `polymerge families`")
    arguments.add_argument(
        "--fold", nargs="*", default=["tokens=64k", "refine=240", "trials=false"], metavar="KEY=VALUE",
        help="of a recipe's fold",
    )  # fmt: skip
    arguments.add_argument("--texts", type=Path)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results/families.jsonl")
    asked = arguments.parse_args()
    workshop = text_experts.Workshop(text_experts.texts_folder(asked.texts), 0, progress=print)
    for family in asked.families:
        plans = (text_experts.PLANS["shakespeare"], replace(text_experts.PLANS["python/seed"], family=family))
        experts = {plan.domain: workshop.expert(plan) for plan in plans}
        wanted = recipe.parse({
            "method": "fold", "anchor": "shakespeare", "dtype": "float32", "fold": settings_of(asked.fold),
            "size": {"params": sum(one.record["parameters"] for one in experts.values())},
            "experts": {
                n: {"model": str(one.folder), "text": list(map(str, one.texts))} for n, one in experts.items()
            },
        })  # fmt: skip
        with TemporaryDirectory() as scratch:
            done = merge(wanted, Path(scratch) / "out")
        line = json.dumps({
            "commit": commit(), "family": family, "fold": settings_of(asked.fold),
            "test": {n: skill["fold"] - skill["owner"] for n, skill in done.skills.items()},
            "owner": {n: skill["owner"] for n, skill in done.skills.items()},
            "parameters": done.parameters, "shape": done.shape, "cpu_seconds": done.cpu_seconds,
        })  # fmt: skip
        print(line)
        with asked.out.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")


if __name__ == "__main__":
    main()
