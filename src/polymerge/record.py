"""What travels with a merged model: config, tokenizer, generation config, card, recipe, lock; and a fold's record."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from polymerge import preflight
from polymerge.calibrate.speech import Speech
from polymerge.calibrate.texts import Skill
from polymerge.checkpoint import hub
from polymerge.checkpoint.card import Card, SkillRow, model_card
from polymerge.checkpoint.lock import LOCK, lock_text, package_versions
from polymerge.checkpoint.reader import Checkpoint
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.errors import OutputError
from polymerge.features import Features
from polymerge.methods._layers import Knobs
from polymerge.methods.fold import Choice, Folded
from polymerge.model.source import Source
from polymerge.model.spec import Spec
from polymerge.recipe import Recipe
from polymerge.result import MergeResult

FOLD = "fold.json"


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, with the names of folders and files only, and of models on the hub."""
    data = recipe.model_dump(mode="json", exclude_none=True)
    for expert in data["experts"].values():
        if not hub.named(expert["model"]):
            expert["model"] = Path(expert["model"]).name
        expert["text"] = [Path(t).name for t in expert["text"]]
    if bases := data.get("options", {}).get("bases"):
        data["options"]["bases"] = [Path(base).name for base in bases]
    return data


def as_yaml(recipe: Recipe) -> str:
    """A recipe that was made in Python, as a file would have it."""
    return yaml.safe_dump(plain(recipe), sort_keys=False)


def digest(recipe: Recipe, sources: Mapping[str, Source], texts: str) -> str:
    """What a fold depends on, hashed: recipe without healing, sources and their bases, calibration rows, versions."""
    data = {
        "recipe": {k: v for k, v in plain(recipe).items() if k not in ("heal", "dtype", "union")},
        "sources": {k: s.checkpoint.digest() for k, s in sources.items()},
        "bases": [base.digest() for base in _bases(recipe)],
        "texts": texts,
        "packages": package_versions(),
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _bases(recipe: Recipe) -> list[Checkpoint]:
    """What a rival's options name beside the experts: the models that these were tuned from."""
    return [Checkpoint(Path(base)) for base in recipe.options.get("bases", ())]


def save_fold(writer: CheckpointWriter, folded: Folded, key: str) -> None:
    """What a later call must know of a finished fold; `Features` by the expert's number."""
    Features.save({str(k): one for k, one in enumerate(folded.features) if one}, writer.folder)
    chosen = asdict(folded.choice)
    chosen["target"]["features"] = sorted(folded.choice.target.features)
    data = {"key": key, "excess": folded.excess, "choice": chosen}
    writer.text(FOLD, json.dumps(data, indent=1) + "\n")


def load_fold(folder: Path, key: str) -> Folded | None:
    """A finished fold in a work folder, None when there is none. OutputError when it is another merge's."""
    path = folder / FOLD
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["key"] != key:
        raise OutputError(
            f"{folder.parent}: holds the work of another merge (recipe, sources, texts or versions differ); "
            "choose another work folder or delete it"
        )
    chosen = data["choice"]
    lists = {"features": frozenset, "frequencies": tuple, "each": tuple, "factors": tuple}
    target = Spec(**{key: lists.get(key, _same)(value) for key, value in chosen["target"].items()})
    choice = Choice(target, Knobs(**chosen["knobs"]), tuple(chosen["balance"]), chosen["trials"])
    features = Features.load(folder)
    return Folded(choice, data["excess"], [features.get(str(k)) for k in range(len(choice.balance))])


def _same(value: Any) -> Any:
    return value


def shape(target: Spec) -> dict[str, Any]:
    """The sizes of a result, as a table shows them."""
    names = ("family", "layers", "width", "heads", "kv_heads", "head_size", "mlp", "vocab")
    return {name: getattr(target, name) for name in names}


def finish(
    writer: CheckpointWriter,
    recipe: Recipe,
    text: str,
    sources: Mapping[str, Source],
    skills: Mapping[str, Skill],
    calibration: str,
    speech: Speech,
    result: MergeResult,
) -> None:
    """Everything beside the weights and the config."""
    speaker = sources[speech.owner].checkpoint
    generation = speaker.generation_config_file()
    for path in (*(() if speech.union else speaker.tokenizer_files()), *([generation] if generation else [])):
        writer.copy(path)
    if speech.union:
        speech.tokenizer.save_pretrained(writer.folder)
    writer.text("polymerge-recipe.yaml", text)
    writer.text(LOCK, lock_text(
        recipe=plain(recipe),
        sources={k: s.checkpoint.file_digests() for k, s in sources.items()},
        texts={k: s.split_record() for k, s in skills.items()},
        calibration=calibration,
        seed=recipe.seed,
        extra={
            "knobs": result.knobs, "balance": result.balance, "shape": result.shape,
            **({"bases": bases} if (bases := [base.file_digests() for base in _bases(recipe)]) else {}),
        },
    ))  # fmt: skip
    part = {name: source for name, source in sources.items() if name not in result.left_out}
    writer.text("README.md", model_card(Card(
        title=f"Merge of {', '.join(part)}",
        base_models=[hub.title(s.path) for s in part.values()],
        method=recipe.method,
        recipe=text,
        description=_describe(recipe, result),
        parameters=result.parameters,
        skills=[SkillRow(k, r["owner"], r["union"], r["fold"], r["healed"]) for k, r in result.skills.items()],
        length=recipe.fold.length,
        licenses=[preflight.licence(s.path) for s in part.values()],
        facts={name: str(value) for name, value in result.shape.items()},
    )))  # fmt: skip


def _describe(recipe: Recipe, result: MergeResult) -> str:
    experts = len(recipe.experts) - len(result.left_out)
    if recipe.method == "union":
        return (
            f"All {experts} experts whole, mixed per token by a Bayesian gate. Load model and tokenizer with "
            "`trust_remote_code=True`; the code is in this folder."
        )
    healed = (
        f", then distilled on {recipe.heal.tokens:,} tokens" if recipe.heal else ", without any end-to-end training"
    )
    many = "One language model" if experts == 1 else f"{experts} language models"
    how = f"averaged by {recipe.method}" if recipe.method != "fold" else "folded in closed form, layer by layer,"
    without = f" Without {', '.join(result.left_out)}: others predict its text better." if result.left_out else ""
    return (
        f"{many} {how} into one {result.shape['family']} decoder{healed}.{without} "
        "A stock transformers checkpoint: no remote code."
    )
