"""A folded model on disk: role by role through the family's table, as a plain Hugging Face checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.model import rope
from polymerge.model.source import Source, pack
from polymerge.model.spec import Family, Spec


def sink(family: Family, target: Spec, writer: CheckpointWriter) -> Callable[[int | None, dict[str, Tensor]], None]:
    """A function that takes weights by role, of one layer or of what is outside (None), and writes them stored."""
    rows = [row for row in family.tensors if row.when is None or row.when in target.features]

    def emit(layer: int | None, weights: dict[str, Tensor]) -> None:
        for row in rows:
            if ("{layer}" in row.name) == (layer is not None) and all(role in weights for role in row.roles):
                writer.add(row.name.format(layer=layer), pack(row, weights, target).cpu())

    return emit


def hf_config(family: Family, target: Spec, lead: Source, speaker: Source | None = None) -> Any:
    """The transformers config of a target that rotates as `lead`; special tokens as of `speaker`, default the lead."""
    from transformers import AutoConfig

    assert family.write is not None
    config = (speaker or lead).config
    special = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    keys = family.write(target)
    if target.frequencies == lead.spec.frequencies:  # scaled rotary embeddings too
        keys["rope_parameters"] = rope.parameters(lead.config)
    config = AutoConfig.for_model(family.model_type, **keys, **special)
    config.architectures = [family.architecture]
    return config


def write_config(writer: CheckpointWriter, config: Any, dtype: torch.dtype) -> None:
    """config.json of a stock model."""
    data = {**config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    data.pop("_name_or_path", None)
    writer.text("config.json", json.dumps(data, indent=2, sort_keys=True) + "\n")


def load_student(folder: Path) -> Any:
    """The folded model in float32, as transformers runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
