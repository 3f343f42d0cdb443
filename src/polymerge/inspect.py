"""Facts about a checkpoint folder, from its config and the headers of its weight files; no weight is read."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.model import rope
from polymerge.model.source import Source
from polymerge.model.spec import Spec


@dataclass(frozen=True)
class Facts:
    """What a checkpoint is. `parameters` counts a tied head once; `bytes` is the tensors' size on disk.

    positions: how tokens know their order. biases: the maps that carry one (norms aside).
    """

    path: str
    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocab: int
    context: int
    positions: str
    norm: str
    activation: str
    gated: bool
    parallel: bool
    qk_norm: bool
    biases: tuple[str, ...]
    tied: bool
    parameters: int
    dtype: str
    bytes: int


def inspect(path: Path | str) -> Facts:
    """The facts of a checkpoint folder. Raises CheckpointError or FamilyError where a merge would."""
    source = Source(path)
    spec, checkpoint = source.spec, source.checkpoint
    dtypes = sorted({str(checkpoint.dtype(name)).removeprefix("torch.") for name in checkpoint.names})
    return Facts(
        path=str(path),
        family=spec.family,
        layers=spec.layers,
        width=spec.width,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_size=spec.head_size,
        mlp=spec.mlp,
        vocab=spec.vocab,
        context=spec.max_positions,
        positions=_positions(spec, source.config),
        norm={"rms": "RMSNorm", "layer": "LayerNorm"}[spec.norm],
        activation=spec.activation,
        gated=spec.gated,
        parallel=spec.parallel,
        qk_norm=bool(spec.features & {"qk_norm", "qk_norm_all"}),
        biases=_biases(source),
        tied=spec.tied,
        parameters=source.parameters,
        dtype=", ".join(dtypes),
        bytes=checkpoint.nbytes,
    )


def _positions(spec: Spec, config: Any) -> str:
    """The position scheme in words."""
    if not spec.frequencies:
        return "learned"
    kind = rope.parameters(config).get("rope_type", "default")
    rotated = 2 * len(spec.frequencies)
    parts = [f"RoPE θ={spec.rope_theta:g}"]
    if rotated < spec.head_size:
        parts.append(f"on {rotated} of {spec.head_size} dimensions")
    if kind != "default":
        parts.append(f"scaled ({kind})")
    if spec.window:
        parts.append(f"window {spec.window}")
    if spec.each:
        parts.append("other in some layers")
    return ", ".join(parts)


def _biases(source: Source) -> tuple[str, ...]:
    """Maps with a bias, in the order of the family's table; norms always have what their kind has."""
    present = (row for row in source.family.tensors if row.when is None or row.when in source.spec.features)
    roles = [role.removesuffix(".bias") for row in present for role in row.roles if role.endswith(".bias")]
    return tuple(dict.fromkeys(role for role in roles if not re.fullmatch(r".*norm\d?", role)))
