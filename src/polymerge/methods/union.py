"""Union: every expert whole in one checkpoint, mixed by a Bayesian gate.

Nothing is computed: each stored tensor of expert i is copied as `experts.{i}.<stored name>`, one tensor in
memory at a time, and the model code travels in the folder:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Names: transformers 5 renames some stored tensors when it loads them (GPT-NeoX: `embed_out` -> `lm_head`), and
does the same for a model inside another one, so stored names are right here. What it does for a top-level
model only is to supply a missing base prefix (GPT-2 files say `wte.weight` for `transformer.wte.weight`):
`stored_names` does that.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from polymerge.align.same import same_vocabulary
from polymerge.align.token_bytes import BYTE_CHARACTER, ByteView, as_view
from polymerge.calibrate.packing import adds_bos
from polymerge.checkpoint.reader import Checkpoint
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.errors import CheckpointError, RecipeError
from polymerge.methods import _union_cache, _union_config, _union_donors, _union_gate, _union_modeling
from polymerge.methods._union_config import UnionConfig
from polymerge.methods._union_modeling import UnionForCausalLM

__all__ = [
    "MODELING_FILE",
    "UnionConfig",
    "UnionForCausalLM",
    "build_union",
    "stored_names",
    "tables",
    "union_config",
]

MODELING_FILE = "modeling_union.py"
CODE = {
    MODELING_FILE: _union_modeling,
    "_union_config.py": _union_config,
    "_union_cache.py": _union_cache,
    "_union_donors.py": _union_donors,
    "_union_gate.py": _union_gate,
}
"""What the checkpoint needs to be read without polymerge: file -> module."""


def union_config(
    experts: Mapping[str, Checkpoint],
    *,
    anchor: str | None = None,
    alpha: float = 0.01,
    skip_below: float = 0.0,
    prior: Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
    tokenizers: Mapping[str, Any] | None = None,
) -> UnionConfig:
    """The union's config; cheap, so that a preflight can call it.

    Args:
        experts: name -> checkpoint; their order is the order of the gate's weights.
        anchor: whose begin, end and padding tokens hold; default the first.
        alpha: share of the weight spread evenly after every token.
        skip_below: gate weight under which an expert does not run (see `UnionConfig`).
        prior: name -> weight before the first token; default even.
        dtype: of the stored weights; default the anchor's.
        tokenizers: name -> fast tokenizer of every expert; default all the same. Give them to `build_union` too.

    Raises:
        PreflightError: tokenizers differ and one does not say which bytes its tokens stand for.
        RecipeError: no expert, an unknown anchor, a prior for other names, or a value out of range.
        CheckpointError: an expert's folder is damaged, or brings code of its own.
    """
    names = list(experts)
    anchor = "".join(names[:1]) if anchor is None else anchor
    if anchor not in experts:
        raise RecipeError(
            f"union: anchor is {anchor!r}, expected one of the experts: {', '.join(names) or 'none given'}"
        )
    if prior is not None and set(prior) != set(names):
        raise RecipeError(f"union: prior names {sorted(prior)}, expected exactly the experts {sorted(names)}")
    for checkpoint in experts.values():
        checkpoint.check()
    weights = None if prior is None else [prior[name] for name in names]
    ids: dict[str, Any] = {
        key: experts[anchor].config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    found, spoken = ([], []) if tokenizers is None else tables(tokenizers, anchor)
    try:
        config = UnionConfig(
            [c.config for c in experts.values()],
            alpha=alpha,
            skip_below=skip_below,
            prior=weights,
            tokenizers=[len(table) for table in found],
            expert_tokenizers=spoken,
            **ids,
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    config.expert_names = names
    config.architectures = [UnionForCausalLM.__name__]
    config.dtype = dtype or _dtype(experts[anchor])
    stem = Path(MODELING_FILE).stem
    config.auto_map = {
        "AutoConfig": f"{stem}.{UnionConfig.__name__}",
        "AutoModelForCausalLM": f"{stem}.{UnionForCausalLM.__name__}",
    }
    return config


def build_union(
    experts: Mapping[str, Checkpoint],
    writer: CheckpointWriter,
    config: UnionConfig,
    dtype: torch.dtype | None = None,
    tokenizers: Mapping[str, Any] | None = None,
    anchor: str | None = None,
) -> None:
    """Write config, model code and all tensors; tokenizer and generation config are the caller's.

    Args:
        experts: as given to `union_config`.
        writer: where to.
        config: from `union_config`.
        dtype: floating-point tensors are converted to it; default each as stored.
        tokenizers: as given to `union_config`.
        anchor: as given to `union_config`.

    Raises:
        CheckpointError: an expert cannot be read.
        OutputError: the output cannot be written.
    """
    writer.text("config.json", json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")
    for name, module in CODE.items():
        writer.text(name, Path(str(module.__file__)).read_text(encoding="utf-8"))
    if tokenizers is not None:
        for i, table in enumerate(tables(tokenizers, anchor or next(iter(experts)))[0]):
            writer.add(f"tokenizer_{i}", torch.tensor(list(table), dtype=torch.uint8))
    for i, checkpoint in enumerate(experts.values()):
        for stored, name in stored_names(checkpoint):
            tensor = checkpoint.tensor(stored)
            convert = dtype is not None and tensor.is_floating_point()
            writer.add(f"experts.{i}.{name}", tensor.to(dtype) if convert else tensor)


def tables(tokenizers: Mapping[str, Any], anchor: str) -> tuple[list[bytes], list[int]]:
    """The tables of all distinct tokenizers, the anchor's first, and which of them each expert has.

    Both empty if all are the same. tokenizers: name -> fast tokenizer or its ByteView.
    Raises PreflightError where they differ and one does not say which bytes its tokens stand for.
    """
    distinct, spoken = [tokenizers[anchor]], []
    for tokenizer in tokenizers.values():
        place = next((i for i, t in enumerate(distinct) if t is tokenizer or not same_vocabulary(t, tokenizer)), None)
        if place is None:
            place = len(distinct)
            distinct.append(tokenizer)
        spoken.append(place)
    return ([_table(t) for t in distinct], spoken) if len(distinct) > 1 else ([], [])


def _table(tokenizer: Any) -> bytes:
    """What the model's `Vocabulary` reads: the tokenizer's file, and the bytes of its tokens."""
    view = as_view(tokenizer)
    backend = json.loads(view.tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None
    facts = {
        "backend": json.dumps(backend),
        "tokens": [None if t is None else t.decode("latin-1") for t in view.bytes],
        "kind": view.kind,
        "space": view.space,
        "roles": dict(view.roles),
        "literals": {b.decode(): i for i, b in enumerate(view.surface) if view.special[i] and view.pieces[i]},
        "lead": _lead(view),
        "alphabet": [BYTE_CHARACTER[b] for b in range(256)],
    }
    return zlib.compress(json.dumps(facts, sort_keys=True).encode(), 9)


def stored_names(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Pairs (stored name, name to store it under) of an expert's tensors.

    Left out: what the model class ignores when loading (causal masks of old GPT-2 and NeoX files), and a tied
    head that is stored a second time with the same values.

    Raises:
        CheckpointError: the config is not that of a causal language model that transformers knows.
    """
    model = _skeleton(checkpoint)
    expected, prefix = set(model.state_dict()), model.base_model_prefix
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected]  # noqa: SLF001
    final = {n: f"{prefix}.{n}" if f"{prefix}.{n}" in expected else n for n in checkpoint.names}
    back = {name: stored for stored, name in final.items()}
    for stored, name in final.items():
        if name not in expected and any(pattern.search(name) for pattern in ignored):
            continue
        source = back.get(model.all_tied_weights_keys.get(name, ""))
        if source is not None and torch.equal(checkpoint.tensor(stored), checkpoint.tensor(source)):
            continue
        yield stored, name


def _skeleton(checkpoint: Checkpoint) -> Any:
    """The expert's model without weights: its names and what its class says about them."""
    try:
        config = AutoConfig.for_model(**checkpoint.config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: not the config of a causal language model that "
            f"transformers knows ({str(error).splitlines()[0]})"
        ) from error


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of a checkpoint's largest floating-point tensor."""
    floating = [n for n in checkpoint.names if checkpoint.dtype(n).is_floating_point]
    return (
        max((torch.Size(checkpoint.shape(n)).numel(), n, checkpoint.dtype(n)) for n in floating)[2]
        if floating
        else torch.float32
    )


def _lead(view: ByteView) -> list[int]:
    """The token that comes before a text: the beginning token if the tokenizer puts one, else the end token."""
    wanted = ("bos", "eos") if adds_bos(view.tokenizer) else ("eos", "bos")
    return [view.roles[role] for role in wanted if role in view.roles][:1]
