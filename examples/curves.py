"""Two curves of the shipped pair: skill against size, and skill against how much text there is.

    python examples/curves.py size [--out examples/results/curves.jsonl]
    python examples/curves.py tokens [--write 40000] [--only 2048]
    python examples/curves.py draw        # examples/figures/curves.png, from the rows alone

`size`: the fold alone, from the larger expert's size to both experts side by side. `tokens`: the same 100 k tokens of
healing, but only so many of them different; the fold is made from those as well, and the padded anchor is distilled on
them. `--write`: each expert adds so many tokens of its own writing to both. Bits per byte over each skill's owner, test
text; the rate is `heal`'s own for the fold, and for the anchor what `floors.py` chose. About five CPU minutes for each
size and each number of tokens.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from pair import Pair, Start

from polymerge import threads
from polymerge.bench.machine import commit
from polymerge.heal import Heal
from polymerge.model.target import load_student

SIZES = ("1.0x", "1.2x", "1.4x", "1.6x", "sum", "2.2x", "2.6x", "union")
TOKENS = (2_048, 8_192, 32_768)
HEALING = 100_000
RATES = {"fold": None, "anchor": 4e-3}  # None: as `heal` chooses


def main() -> None:
    """Append the rows of a curve, or draw both."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("curve", choices=["size", "tokens", "draw"])
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results/curves.jsonl")
    arguments.add_argument("--write", type=int, default=0, help="tokens that each expert adds of its own writing")
    arguments.add_argument("--only", type=int, nargs="*", help="of the numbers of tokens")
    asked = arguments.parse_args()
    if asked.curve == "draw":
        draw(asked.out)
        return
    with asked.out.open("a", encoding="utf-8") as lines, threads.fitting(1):
        for value in SIZES if asked.curve == "size" else asked.only or TOKENS:
            made = by_size(value, asked.seed) if asked.curve == "size" else by_tokens(value, asked.seed, asked.write)
            for row in made:
                line = json.dumps({"commit": commit(), "kind": asked.curve, "seed": asked.seed, **row})
                print(line, flush=True)
                lines.write(line + "\n")
                lines.flush()


def by_size(size: str, seed: int) -> list[dict]:
    """The fold at one size."""
    with TemporaryDirectory() as scratch:
        pair = Pair(Path(scratch), seed)
        start = pair.fold(sum(pair.sizes.values()) if size == "sum" else size)
        return [{"method": "fold", "size": size, "before": pair.excess(load_student(start.folder)), **start.facts}]


def by_tokens(tokens: int, seed: int, write: int) -> list[dict]:
    """Fold + heal and the padded anchor, with so many different tokens of each skill, and what experts write."""
    with TemporaryDirectory() as scratch:
        pair = Pair(Path(scratch), seed, tokens, write)
        fold = pair.fold("1.5x")
        starts: dict[str, Start] = {"fold": fold, "anchor": pair.anchor(fold.spec)}
        return [
            {
                "method": name,
                "unique": tokens,
                "written": write,
                **pair.healed(start, Heal(tokens=HEALING, lr=RATES[name])),
            }
            for name, start in starts.items()
        ]


def draw(rows: Path) -> None:
    """Both curves side by side."""
    from matplotlib import pyplot as plt

    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = sorted((r for r in found if r["kind"] == "size"), key=lambda r: r["parameters"])
    for skill in sizes[0]["before"]:
        left.plot([r["parameters"] / 1e6 for r in sizes], [r["before"][skill] for r in sizes], "o-", label=skill)
    left.set(xlabel="million parameters", ylabel="bits per byte over the owner", title="fold alone")
    lines = {
        "fold": ("fold", "before"),
        "fold + heal": ("fold", "after"),
        "padded anchor distilled": ("anchor", "after"),
    }
    by_method = {method: f"C{i}" for i, method in enumerate(lines)}
    for write in (False, True):
        for label, (method, stage) in lines.items():
            mine = [r for r in found if r["kind"] == "tokens" and r["method"] == method]
            mine = sorted((r for r in mine if bool(r.get("written")) == write), key=lambda r: r["unique"])
            place = [r["unique"] for r in mine], [max(r[stage].values()) for r in mine]
            told = {"label": None if write else label, "color": by_method[label]}
            right.plot(*place, "s--" if write else "o-", **told)
    right.plot([], [], "s--", color="gray", label="with what the experts write")
    right.set(xlabel="different tokens of each skill", xscale="log", title="worst skill, 100 k tokens of healing")
    right.set_xticks(TOKENS, [f"{n // 1024} k" for n in TOKENS])
    right.minorticks_off()
    for axes in (left, right):
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.legend(frameon=False)
    target = Path(__file__).parent / "figures/curves.png"
    figure.savefig(target, dpi=150)
    print(target)


if __name__ == "__main__":
    main()
