"""What skill costs: the worst skill of three pairs against CPU seconds, by a whole fold, a lean one and no fold.

    python examples/plot_price.py      # examples/figures/price.png, from the rows alone

Folds and their healing by so many tokens, at `heal`'s own rate, are rows of `variant.py`; the padded anchor's, and the
lean fold's longest, are the benchmark's. Bits per byte over the owner, test text, seed 0, sum of sizes.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from polymerge import recipe

RESULTS = Path(__file__).parent / "results"
CASES = {
    "shakespeare+python/seed/sum": "Llama + Llama",
    "gsm8k+stories/sum": "Qwen2 + Qwen3",
    "rust+wiki/sum": "Mistral + Qwen2",
}
WHOLE, LEAN, ANCHOR = "whole fold (240 steps), healed", "lean fold, healed", "padded anchor, distilled"
LINES = {WHOLE: "o-", LEAN: "s-", ANCHOR: "^:"}
FOLDS = {"{}": WHOLE, str({"refine": 240}): WHOLE, "lean": LEAN, str(recipe.LEAN | {"tokens": "32k"}): LEAN}
"""What is drawn, by the fold that a row asked for; `{}` meant 240 steps of refinement when its rows were made."""
Point = tuple[float, float]


def main() -> None:
    """Draw."""
    from matplotlib import pyplot as plt

    figure, every = plt.subplots(1, len(CASES), figsize=(9.6, 3.4), sharey=True, layout="constrained")
    for axes, (case, title) in zip(every, CASES.items(), strict=True):
        points = folds(case) | {ANCHOR: anchor(case)}
        for label, style in LINES.items():
            axes.plot(*zip(*sorted(points[label]), strict=True), style, label=label)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set(title=title, xscale="log", xlabel="CPU seconds", ylim=(-0.01, 0.13))
        axes.set_xticks([50, 100, 200, 400, 800], ["50", "100", "200", "400", "800"])
        axes.minorticks_off()
    every[0].set_ylabel("worst skill, bits per byte over its owner")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(LINES), frameon=False)
    target = Path(__file__).parent / "figures/price.png"
    figure.savefig(target, dpi=150)
    print(target)


def folds(case: str) -> dict[str, list[Point]]:
    """CPU seconds and worst skill of both folds, alone and healed; of the lean one also as the benchmark healed it."""
    found: dict[str, list[Point]] = defaultdict(list)
    for row in rows("variants.jsonl"):
        heal, label = row.get("heal") or {}, FOLDS.get(str(row.get("fold")))
        if row["case"] != case or label is None or set(heal) != {"tokens"}:
            continue
        spent = row["cpu_seconds"]
        alone = sum(spent.get(stage, 0.0) for stage in ("basis", "choose", "refine", "fold"))
        found[label] += [
            (alone, max(row["test"]["fold"].values())), (alone + spent["heal"], max(row["test"]["healed"].values())),
        ]  # fmt: skip
    found[LEAN] += [(row["cpu_seconds"], lost(row)) for row in of(case, "fold_heal_more")]
    return found


def anchor(case: str) -> list[Point]:
    """The same of the padded anchor, distilled alone; a token costs what it costs in the long runs."""
    long = of(case, "anchor_distill_more")
    each = min(row["cpu_seconds"] / row["tokens"] for row in long)
    return [(each * row["tokens"], lost(row)) for row in (*long, *of(case, "anchor_distill"))]


def of(case: str, method: str) -> list[dict[str, Any]]:
    """The benchmark's rows, of both profiles."""
    found = (*rows("text-medium.jsonl"), *rows("text-full.jsonl"))
    return [row for row in found if (row["case"], row["method"], row["seed"]) == (case, method, 0)]


def lost(row: dict[str, Any]) -> float:
    """The worst skill, bits per byte over its owner."""
    return max(float(score - row["owners"][skill]) for skill, score in row["scores"].items())


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file of results."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
