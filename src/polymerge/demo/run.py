"""The demo: two small experts that come with polymerge, merged, measured and shown.

    prose   prose-llama  Llama, 4 layers, width 128   English prose about Python
    code    code-neox    GPT-NeoX, 6 layers, width 96   Python source

The texts are the modules that neither expert was trained on (`corpus.py`). In the folder:

    text/{prose,code}.txt  recipe.yaml  model/  summary.json  report.html
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.demo.corpus import write_heldout
from polymerge.errors import OutputError
from polymerge.progress import Progress, Quiet
from polymerge.report import html

EXPERTS = {
    "prose": Path(__file__).parent / "experts/prose-llama",
    "code": Path(__file__).parent / "experts/code-neox",
}

PROMPTS = {
    "prose": "The method returns the number of ",
    "code": "    def __init__(self, ",
}

RECIPE = """\
# The recipe of `polymerge demo`: run it again with `polymerge merge {recipe} OUT`.
method: fold                 # closed form, layer by layer, into one plain model
anchor: prose                # whose family and tokenizer the result takes
experts:
  prose: {{model: {prose}, text: text/prose.txt}}
  code: {{model: {code}, text: text/code.txt}}
size: {{params: 1.5x}}         # times the largest expert
fold: {{refine: 240}}          # half of the default's steps: healing follows, and a demo should be short
heal: {{tokens: 400k}}         # a short distillation from the experts
dtype: bfloat16
seed: 0
"""

_MARK = ".polymerge-demo"


@dataclass(frozen=True)
class Demo:
    """What the demo made. samples: {domain: {prompt, text}}."""

    model: Path
    summary: dict[str, Any]
    samples: dict[str, dict[str, str]]
    report: Path


def run(out: Path | str, *, device: str = "auto", progress: Progress | None = None) -> Demo:
    """Run the demo in a folder; what an earlier demo left there is replaced.

    Raises OutputError when the folder holds anything that is not a demo's.
    """
    import polymerge

    folder, progress = Path(out), progress or Quiet()
    _clear(folder)
    progress.stage("texts", 1)
    write_heldout(folder / "text")
    progress.advance()
    recipe = folder / "recipe.yaml"
    places = {name: json.dumps(_relative(path, folder)) for name, path in EXPERTS.items()}
    recipe.write_text(RECIPE.format(recipe=recipe, **places), encoding="utf-8")
    result = polymerge.merge(recipe, folder / "model", device=device, progress=progress)
    progress.stage("samples", len(PROMPTS))
    samples = write_samples(folder / "model", progress)
    summary = {
        **result.summary(),
        "version": polymerge.__version__,
        "recipe": recipe.read_text(encoding="utf-8"),
        "samples": samples,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    page = folder / "report.html"
    html.write(page, summary)
    return Demo(folder / "model", summary, samples, page)


def write_samples(model: Path, progress: Progress) -> dict[str, dict[str, str]]:
    """A continuation of each domain's prompt by the merged model, loaded as any user would load it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = {}
    for name, prompt in PROMPTS.items():
        set_seed(0)
        tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        written = loaded.generate(
            **tokens,
            max_new_tokens=80,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            pad_token_id=tokenizer.eos_token_id,
        )
        text = tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        found[name] = {"prompt": prompt, "text": text}
        progress.advance(name)
    return found


def _clear(folder: Path) -> None:
    """Make room for a new run; only a folder that a demo made is cleared."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: exists and is not a folder; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).is_file():
        raise OutputError(f"{folder}: exists and was not made by the demo; choose another folder or delete it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).write_text("made by `polymerge demo`, which may replace what is here\n", encoding="utf-8")
        for old in ("model", "text"):
            if (folder / old).is_dir():
                shutil.rmtree(folder / old)
        for old in ("recipe.yaml", "summary.json", "report.html"):
            (folder / old).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error


def _relative(path: Path, folder: Path) -> str:
    """The path as seen from the folder, so that both can move together; absolute across drives."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.as_posix()
