"""The figures that the README claims for the shipped experts: fold, heal, and the padded anchor distilled alike.

    python examples/floors.py [--seeds 1] [--methods fold+heal,anchor+distil] [--out examples/results/floors.jsonl]

At the sum of both experts' parameters and at the larger expert's: worst skill before and after healing with 400 k
tokens (and an eighth of them), by the teachers or by teachers and text. The controls are the anchor padded without
loss to the same number of parameters and distilled on the same tokens, or trained on the text itself with no teacher.
Learning rates of all are chosen on validation text from the same grid with seed 0; other seeds keep them. One JSON
line per run; all excesses are bits per byte over each skill's owner, on test text.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pair import Pair

from polymerge import record, threads
from polymerge.bench.machine import commit
from polymerge.heal import Heal

RATES = (1e-3, 2e-3, 4e-3)
TOKENS = 400_000
METHODS = {
    "fold+heal": ("fold", None, TOKENS),
    "fold+heal/8": ("fold", None, TOKENS // 8),
    "fold+heal+text": ("fold", 0.8, TOKENS),
    "anchor+distil": ("anchor", None, TOKENS),
    "anchor+text": ("anchor", 1.0, TOKENS),
}
"""What healing starts from, the share of the text's own next tokens (None: teachers alone), and tokens."""


def main() -> None:
    """Run all cases; lines are appended as they come."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS), help="default all")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results/floors.jsonl")
    asked = arguments.parse_args()
    common = {"commit": commit(), "versions": record.package_versions()}
    chosen: dict[tuple[str, str], float] = {}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with asked.out.open("a", encoding="utf-8") as lines:
        for seed in range(asked.seeds):
            for size in ("sum", "1.0x"):
                for row in case(size, seed, {name: METHODS[name] for name in asked.methods}, chosen):
                    line = json.dumps({**common, "size": size, **row})
                    print(line, flush=True)
                    lines.write(line + "\n")
                    lines.flush()


def case(
    size: str, seed: int, methods: dict[str, tuple[str, float | None, int]], chosen: dict[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """Rows of one size: fold + heal, and the controls; rates that no seed has `chosen` yet are added to it."""
    with TemporaryDirectory() as scratch, threads.fitting(1):
        pair = Pair(Path(scratch), seed)
        fold = pair.fold(sum(pair.sizes.values()) if size == "sum" else size)
        starts = {"fold": fold, "anchor": pair.anchor(fold.spec)}
        rows = []
        for method, (start, text, tokens) in methods.items():
            rates = [chosen[size, method]] if (size, method) in chosen else RATES
            tried = [
                pair.healed(starts[start], Heal(tokens=tokens, lr=rate, text=text, evaluate_every=13)) for rate in rates
            ]
            best = min(tried, key=lambda row: row["validation_worst"])
            chosen[size, method] = best["lr"]
            rows.append({"method": method, **best})
    by_name = {row["method"]: row for row in rows}
    if {"fold+heal", "anchor+distil"} <= by_name.keys():
        ours, final = by_name["fold+heal"], by_name["anchor+distil"]["validation_worst"]
        ours["tokens_to_reach_control"] = next((tokens for tokens, worst in ours["curve"] if worst <= final), None)
    return rows


if __name__ == "__main__":
    main()
