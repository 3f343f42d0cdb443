"""A case of the text suite merged by other settings than its own: for the tables of LOG.md that ask "what if".

    python examples/variant.py shakespeare+python/seed/sum --fold ownership=gate
    python examples/variant.py rust+wiki/sum --fold lean --heal tokens=1.65M
    python examples/variant.py gsm8k+stories/sum --size params=1.5M width=144

Settings are those of a recipe (docs/recipe.md). A run adds one JSON line to `--out`: bits per byte over each skill's
owner, on validation text (to choose by) and on test text. Experts are trained when they are first needed, from the
texts that `--texts` or POLYMERGE_TEXTS names (docs/benchmark.md).
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from polymerge import merge, recipe
from polymerge.bench import text, text_experts
from polymerge.bench.machine import commit, describe
from polymerge.calibrate.texts import read_skill
from polymerge.calibrate.tokenizer import load_tokenizer
from polymerge.evaluate import bits_per_byte
from polymerge.merge import pick_device
from polymerge.model.source import Source
from polymerge.model.target import load_student
from polymerge.progress import Quiet
from polymerge.readers import VALIDATION_ROWS, measure_experts, rows_of


def main() -> None:
    """Merge, measure, and add the row."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("case", help="of `polymerge bench text --profile full` or `large`")
    for part in ("fold", "heal", "size"):
        arguments.add_argument(f"--{part}", nargs="*", metavar="KEY=VALUE", help=f"of a recipe's {part}")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--texts", type=Path)
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results/variants.jsonl")
    asked = arguments.parse_args()
    settings = {
        part: settings_of(some) for part in ("fold", "heal", "size") if (some := getattr(asked, part)) is not None
    }
    line = json.dumps({"commit": commit(), "case": asked.case, "seed": asked.seed, **settings, **run(asked, settings)})
    print(line)
    with asked.out.open("a", encoding="utf-8") as lines:
        lines.write(line + "\n")


def settings_of(given: list[str]) -> str | dict[str, Any]:
    """One word as it is; KEY=VALUE as YAML reads the value."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    return {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in given)}


def run(asked: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What the merge gave and took."""
    cases = [case for profile in ("full", "large") for case in text.cases(profile)]
    [detail] = [case.detail for case in cases if case.name == asked.case]
    folder, device = text_experts.texts_folder(asked.texts), pick_device(asked.device)
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        found = text.given(detail, place, folder, asked.seed, device, print)
        sources = {name: Source(one.model, device=device) for name, one in found.items()}
        settings.setdefault("size", detail.size(sum(s.parameters for s in sources.values())))
        wanted = recipe.parse({
            "method": "fold", "anchor": detail.anchor, "experts": {name: one.recipe for name, one in found.items()},
            "dtype": "float32", "seed": asked.seed, **settings,
        })  # fmt: skip
        done = merge(wanted, place / "out", device=device)
        skills = {n: read_skill(n, e.text, field=e.field, seed=asked.seed) for n, e in wanted.experts.items()}
        speaker = load_tokenizer(sources[detail.anchor].path)
        rows = rows_of(skills, "validation", speaker, wanted.fold.length, VALIDATION_ROWS)
        owners = measure_experts(sources, rows, wanted.union.alpha, Quiet())
        model = load_student(place / "out")
        held_out = {
            name: bits_per_byte(model, part, device=device) - owners[name]["owner"] for name, part in rows.items()
        }
    test = {
        stage: {name: row[stage] - row["owner"] for name, row in done.skills.items()}
        for stage in ("fold", *(["healed"] if done.heal_curve else []))
    }
    return {
        "validation": held_out, "test": test, "parameters": done.parameters, "shape": done.shape, "knobs": done.knobs,
        "balance": done.balance, "device": describe(device), "seconds": done.seconds, "cpu_seconds": done.cpu_seconds,
        "peak_bytes": done.peak_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    main()
