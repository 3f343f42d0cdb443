"""The figures of merges across tokenizers: prose-llama with a code expert that reads another one.

    python examples/train_experts.py code-neox-4k --minutes 8 --out out/experts
    python examples/across_tokenizers.py out/experts/code-neox-4k
    python examples/across_tokenizers.py out/experts/code-neox-bytes --length 96 --across likelihood --text 0
    python examples/across_tokenizers.py out/experts/code-neox-4k --tokenizer union --params 3M

Prints bits per byte on test text of every skill: experts, union, fold, healed. About four CPU minutes.
"""

import argparse
import json
import tempfile
from pathlib import Path

from polymerge import recipe
from polymerge.demo.corpus import write_heldout
from polymerge.demo.run import EXPERTS
from polymerge.heal import Heal
from polymerge.merge import merge


def main() -> None:
    """Read the command line, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", type=Path, help="folder of the code expert")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--across", default="distribution", choices=["distribution", "likelihood"])
    parser.add_argument("--text", type=float, default=Heal.text, help="share of the text's own tokens in healing")
    parser.add_argument("--tokenizer", default="prose", choices=["prose", "code", "union"], help="the result's")
    parser.add_argument("--params", default="1.6M", help="size of the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        texts = Path(place) / "text"
        write_heldout(texts)
        models = {"prose": EXPERTS["prose"], "code": options.code.resolve()}
        asked = recipe.parse({
            "method": "fold", "anchor": "prose", "size": {"params": options.params},
            "tokenizer": options.tokenizer, "fold": {"length": options.length},
            "heal": {"tokens": "400k", "length": options.length, "across": options.across, "text": options.text},
            "experts": {k: {"model": str(m), "text": str(texts / f"{k}.txt")} for k, m in models.items()},
        })  # fmt: skip
        result = merge(asked, Path(place) / "out")
    told = ("skills", "parameters", "shape", "worst_skill")
    print(json.dumps({name: getattr(result, name) for name in told}, indent=1))


if __name__ == "__main__":
    main()
