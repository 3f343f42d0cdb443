"""An expert opened lazily: its spec, and canonical weights one layer at a time.

Everything that the checkpoint stores must be claimed by the family's table, and every config key that differs
from its default must be understood: otherwise opening stops and names what is unknown.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor
from transformers.activations import ACT2FN

from polymerge import families
from polymerge.checkpoint.reader import Checkpoint
from polymerge.errors import FamilyError
from polymerge.model import decoder, rope
from polymerge.model.spec import CANONICAL, HARMLESS, NEUTRAL, Family, Spec, Stored, axis_lengths


class Source:
    """A Hugging Face folder as an expert. `spec` says what it computes; weights come by role, in `dtype`."""

    def __init__(self, path: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = Checkpoint(Path(path))
        self.checkpoint.check()
        self.device, self.dtype = device, dtype
        self.family, self.config, self.spec = read_config(self.checkpoint)
        self._strip = self._stored_without_prefix()
        if self.spec.tied and self._has_another_head():
            self.spec = replace(self.spec, tied=False, features=self.spec.features | {"head"})
        self._check_names()

    @property
    def path(self) -> Path:
        """The folder."""
        return self.checkpoint.path

    @property
    def parameters(self) -> int:
        """Stored parameters, tied tensors once."""
        return sum(
            torch.Size(self.checkpoint.shape(name)).numel() for row in self.family.tensors for name in self._names(row)
        )

    def outer(self) -> dict[str, Tensor]:
        """Embeddings, positions, final norm and head by role (a tied head is the embedding, each by its own factor)."""
        weights, factors = self._load(None), dict(self.spec.factors)
        if self.spec.tied:
            ratio = factors.get("head.weight", 1.0) / factors.get("embed.weight", 1.0)
            weights["head.weight"] = weights["embed.weight"] if ratio == 1 else ratio * weights["embed.weight"]
        return weights

    def layer(self, index: int) -> dict[str, Tensor]:
        """The weights of one layer by role."""
        return self._load(index)

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "batch time"]) -> Tensor:
        """Logits of a batch, layer by layer (batch, time, vocab)."""
        outer = self.outer()
        [states] = self.states(outer, [tokens])
        return decoder.logits(self.spec, outer, states)

    @torch.no_grad()
    def log_probs(self, tokens: Int[Tensor, "row time"], batch: int = 32) -> Tensor:
        """Log p(next token) at every position but the last (row, time - 1), one layer in memory at a time."""
        outer, scores, batches = self.outer(), [], tokens.split(batch)
        for rows, x in zip(batches, self.states(outer, batches), strict=True):
            log_probs = decoder.logits(self.spec, outer, x[:, :-1]).log_softmax(-1)
            scores.append(log_probs.gather(-1, rows[:, 1:, None].to(self.device))[..., 0].cpu())
        return torch.cat(scores)

    @torch.no_grad()
    def states(self, outer: Mapping[str, Tensor], batches: Sequence[Tensor]) -> list[Tensor]:
        """The last states (row, time, resid) of batches of tokens (row, time), each layer read once for all of them."""
        states = [decoder.embed(self.spec, outer, tokens.to(self.device)) for tokens in batches]
        for index in range(self.spec.layers):
            spec, weights = self.spec.at(index), self.layer(index)
            states = [decoder.layer(spec, weights, x).out for x in states]
        return states

    def _load(self, index: int | None) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for row in self._rows():
            if ("{layer}" in row.name) == (index is not None):
                tensor = self.checkpoint.tensor(self._name(row, index)).to(self.device, self.dtype)
                weights.update(unpack(row, tensor, self.spec))
        return weights

    def _rows(self) -> list[Stored]:
        return [row for row in self.family.tensors if row.when is None or row.when in self.spec.features]

    def _names(self, row: Stored) -> list[str]:
        if row not in self._rows():
            return []
        layers = range(self.spec.layers) if "{layer}" in row.name else [None]
        return [self._name(row, i) for i in layers]

    def _name(self, row: Stored, index: int | None) -> str:
        names = [name.format(layer=index).removeprefix(self._strip) for name in (row.name, *row.also)]
        return next((n for n in names if n in self._stored), names[0])

    def _stored_without_prefix(self) -> str:
        self._stored = frozenset(self.checkpoint.names)
        prefix = self.family.prefix
        return "" if any(n.startswith(prefix) for n in self._stored) else prefix

    def _has_another_head(self) -> bool:
        """Whether a head is stored beside the embedding that it should be, and is not: transformers takes the head."""
        embeds = [row for row in self.family.tensors if row.roles == ("embed.weight",)]
        heads = [row for row in self.family.tensors if row.when == "head" and self._name(row, None) in self._stored]
        if not heads:
            return False
        table, *found = (self.checkpoint.tensor(self._name(row, None)).to(self.dtype) for row in (*embeds, *heads))
        return any(not torch.equal(table, head) for head in found)

    def _check_names(self) -> None:
        expected = {name: row for row in self._rows() for name in self._names(row)}
        folder, sizes = self.path, self.spec.sizes()
        tied = {name for row in self.family.tensors if row.when == "head" for name in (row.name, *row.also)}
        for name in self.checkpoint.names:
            extra_head = self.spec.tied and name in tied
            if name not in expected and not name.endswith(self.family.buffers) and not extra_head:
                raise FamilyError(
                    f"{folder}: tensor {name!r} is not in the {self.family.model_type} table; "
                    "it would be lost in a merge, so the model is refused"
                )
        for name, row in expected.items():
            if name not in self._stored:
                raise FamilyError(f"{folder}: tensor {name!r} is missing; the config promises it")
            shape, wanted = tuple(self.checkpoint.shape(name)), axis_lengths(row.axes, sizes)
            if shape != wanted:
                raise FamilyError(
                    f"{folder}: tensor {name!r} has shape {shape}; config.json says {wanted} ({row.axes})"
                )
            if not (dtype := self.checkpoint.dtype(name)).is_floating_point:
                raise FamilyError(
                    f"{folder}: tensor {name!r} is stored as {dtype}; expected floating point: merge the model from "
                    "before it was quantised"
                )


def read_config(checkpoint: Checkpoint) -> tuple[Family, Any, Spec]:
    """Family, transformers config and spec of a folder. Raises FamilyError for anything not understood."""
    from transformers import AutoConfig

    where = checkpoint.path / "config.json"
    raw = dict(checkpoint.config)
    if not isinstance(kind := raw.pop("model_type", None), str):
        raise FamilyError(f"{where}: no `model_type`, which says what the model is; get the file again")
    try:
        family = families.get(kind)
        config = AutoConfig.for_model(family.model_type, **raw)
        declared = type(config)().to_dict()
        told = {
            key: value
            for key in config.to_diff_dict()
            if (value := getattr(config, key)) not in (None, False) or key in declared  # `use_mrope: false`
        }
        if (part := rope.partial(config)) != 1.0:  # transformers moves it into `rope_parameters`
            told["partial_rotary_factor"] = part
        unknown = {k: told[k] for k in sorted(set(told) - family.claimed - HARMLESS) if not k.startswith("_")}
        _refuse({k: v for k, v in unknown.items() if v != NEUTRAL.get(k, ...)}, config.model_type)
        return family, config, _known_activation(family.read(config))
    except FamilyError as error:
        raise FamilyError(f"{where.parent}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise FamilyError(f"{where}: transformers refuses it: {error}") from error


def _known_activation(spec: Spec) -> Spec:
    if spec.activation not in ACT2FN:
        raise FamilyError(f"config.json: the activation {spec.activation!r} is none that transformers knows")
    return spec


def _refuse(unknown: Mapping[str, Any], model_type: str) -> None:
    if "quantization_config" in unknown:
        raise FamilyError("config.json: the model is quantised (`quantization_config`); merge the one from before")
    for key, value in unknown.items():
        raise FamilyError(
            f"config.json: {key!r} is {value!r}, which the {model_type} table does not know; "
            "remove the key if it changes nothing"
        )


def unpack(row: Stored, tensor: Tensor, spec: Spec) -> dict[str, Tensor]:
    """A stored tensor as canonical tensors by role, as the engine computes with them."""
    if "|" in row.axes:
        rows = row.parts()
        lengths = [axis_lengths(part.axes, spec.sizes())[0] for part in rows]
        found = [unpack(part, t, spec) for part, t in zip(rows, tensor.split(lengths), strict=True)]
        return {role: t for one in found for role, t in one.items()}
    sizes, factors = _axes(row, spec), dict(spec.factors)
    # An axis qkv needs heads without KV groups: q's axes serve all three.
    stack = "qkv " if len(row.roles) > 1 else ""
    parts = rearrange(tensor, f"{row.axes} -> {stack}{CANONICAL[row.roles[0]]}", **sizes)
    each = parts if stack else (parts,)
    return {
        role: ((t + row.plus) * factors.get(role, 1.0) if row.plus or role in factors else t).contiguous()
        for role, t in zip(row.roles, each, strict=True)
    }


def pack(row: Stored, weights: dict[str, Tensor], spec: Spec) -> Tensor:
    """The inverse of `unpack`: the stored tensor of a row."""
    if "|" in row.axes:
        return torch.cat([pack(part, weights, spec) for part in row.parts()])
    factors = dict(spec.factors)
    each = [
        weights[role] / factors.get(role, 1.0) - row.plus if row.plus or role in factors else weights[role]
        for role in row.roles
    ]
    stack, whole = ("qkv ", torch.stack(each)) if len(each) > 1 else ("", each[0])
    packed: Tensor = rearrange(whole, f"{stack}{CANONICAL[row.roles[0]]} -> {row.axes}", **_axes(row, spec))
    return packed.contiguous()


def _axes(row: Stored, spec: Spec) -> dict[str, int]:
    """The lengths of the axes that a row names."""
    return {axis: n for axis, n in spec.sizes().items() if axis in re.findall(r"\w+", row.axes)}
