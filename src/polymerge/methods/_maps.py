"""Applying an alignment: every weight of an expert as a weight of the target, and their average.

    W' = Outᵀ W In,   with one pair of maps per axis of W:

    stream    write (resid, target resid): x' = x write     read (resid, target resid): W' = W read
    layer     q, k, v, gate, up (rows of readers) and o, down (columns of writers), each (own units, target units)

A semi-orthogonal Q of width d to D is write = c Q, read = Q / c, c² = D/d: then x' / rms(x') is what readers expect.

Averages respect what is free: a unit that an expert does not have (zero outgoing weight) takes its incoming weights
from those that have it; its outgoing weights count as zero. In a layer that an expert lacks, it is the identity: zero
writers, and no say in the readers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polymerge.align.matching import GroupPair, selection
from polymerge.methods._lift import Lifted
from polymerge.model.spec import CANONICAL, Spec

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Stream:
    """Maps of a residual stream.

    `ratio` is the scale of write over read (c² above), of all dimensions or of each: a tied head is corrected by it.
    """

    write: Float[Tensor, "resid target"]
    read: Float[Tensor, "resid target"]
    ratio: float | Float[Tensor, " target"] = 1.0

    def gamma(self, gamma: Float[Tensor, " resid"]) -> Float[Tensor, " target"]:
        """A norm's weight in the target's coordinates: exact for permutations, the best diagonal otherwise."""
        share = (self.write * self.read).abs().to(gamma)
        total = share.sum(0)
        empty = total < 1e-9  # noqa: PLR2004 - a target dimension that the expert does not use
        return torch.where(empty, gamma.mean(), gamma @ share / total.clamp_min(1e-9))


@dataclass(frozen=True)
class LayerMaps:
    """Maps of one layer's inner axes, (own units, target units) each."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def semi_orthogonal(q: Float[Tensor, "resid target"], kept: float = 1.0) -> Stream:
    """The stream of an expert rotated by Q; `kept` is the share of its power that Q keeps, where it is narrower."""
    scale = (q.shape[1] / q.shape[0] / max(kept, 1e-12)) ** 0.5
    return Stream(q * scale, q / scale, scale**2)


def head_maps(
    pairs: Sequence[GroupPair],
    spec: Spec,
    target: Spec,
    blocks: Mapping[int, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Maps of q, k, v, o (float64) that move KV groups; `blocks` (hd, hd) of q, k, v, o inside, by source group."""
    size, ratio = target.head_size, target.heads // target.kv_heads
    eye = torch.eye(size, dtype=torch.float64)
    out = {
        role: torch.zeros(n * size, m * size, dtype=torch.float64)
        for role, n, m in (
            ("q", spec.heads, target.heads),
            ("k", spec.kv_heads, target.kv_heads),
            ("v", spec.kv_heads, target.kv_heads),
            ("o", spec.heads, target.heads),
        )
    }
    for pair in pairs:
        q, k, v, o = (blocks or {}).get(pair.source, (eye, eye, eye, eye))
        _place(out["k"], k, pair.source, pair.target)
        _place(out["v"], v, pair.source, pair.target)
        for place, head in enumerate(pair.order):
            _place(out["q"], q, pair.source * ratio + head, pair.target * ratio + place)
            _place(out["o"], o, pair.source * ratio + head, pair.target * ratio + place)
    return out


def _place(out: Tensor, block: Tensor, i: int, j: int) -> None:
    size = len(block)
    out[i * size : (i + 1) * size, j * size : (j + 1) * size] = block


def as_it_is(expert: Lifted, target: Spec, weights: Weights) -> LayerMaps:
    """Units in their own order at the front; where they don't fit, those with the largest outgoing weights."""
    ratio = target.heads // target.kv_heads
    power = weights["o.weight"].pow(2).sum(0).view(expert.groups, -1).sum(1)
    groups = _largest(power, target.kv_heads)
    pairs = [GroupPair(i, j, tuple(range(ratio))) for j, i in enumerate(groups)]
    kept = _largest(weights["down.weight"].pow(2).sum(0), target.mlp)
    neurons = selection([(i, j) for j, i in enumerate(kept)], expert.spec.mlp, target.mlp)
    return LayerMaps(**head_maps(pairs, expert.spec, target), gate=neurons, up=neurons, down=neurons)


def _largest(power: Tensor, keep: int) -> list[int]:
    order = torch.argsort(power, descending=True, stable=True)[:keep] if len(power) > keep else torch.arange(len(power))
    kept: list[int] = order.sort().values.tolist()
    return kept


def apply(weights: Weights, stream: Stream, maps: LayerMaps) -> Weights:
    """A layer of an expert in the target's axes."""
    like = weights["o.weight"]
    write, read = stream.write.to(like), stream.read.to(like)
    out: Weights = {}
    for name, w in weights.items():
        role, kind = name.split(".")
        if role.startswith("norm"):
            out[name] = stream.gamma(w)
        elif role in ("o", "down"):
            out[name] = write.T @ w @ getattr(maps, role).to(like) if kind == "weight" else w @ write
        elif role in ("q_norm", "k_norm"):
            out[name] = w
        else:
            units = getattr(maps, role).to(like)
            out[name] = units.T @ w @ read if kind == "weight" else w @ units
    return out


def blank(target: Spec, like: Tensor) -> Weights:
    """A target layer that does nothing."""
    sizes = target.sizes()
    axes = {
        role: [sizes[a] for a in spec.replace("(", "").replace(")", "").split()] for role, spec in CANONICAL.items()
    }
    features = {"qkv_bias": ("q.bias", "k.bias", "v.bias"), "o_bias": ("o.bias",),
                "mlp_bias": ("gate.bias", "up.bias", "down.bias"),
                "qk_norm": ("q_norm.weight", "k_norm.weight")}  # fmt: skip
    roles = [f"{role}.weight" for role in ("q", "k", "v", "o", "gate", "up", "down", "norm1", "norm2")]
    roles += [role for feature, extra in features.items() if feature in target.features for role in extra]
    shapes = {
        "q.weight": (target.heads * target.head_size, target.width),
        "q.bias": (target.heads * target.head_size,),
        **{f"{role}.weight": (target.kv_heads * target.head_size, target.width) for role in "kv"},
        **{f"{role}.bias": (target.kv_heads * target.head_size,) for role in "kv"},
        "o.weight": (target.width, target.heads * target.head_size),
    }
    zeros = {role: like.new_zeros(*shapes.get(role, axes[role])) for role in roles}
    return {role: torch.ones_like(z) if "norm" in role else z for role, z in zeros.items()}


def average(parts: Sequence[tuple[float, Weights]], target: Spec, like: Tensor, *, add: bool = False) -> Weights:
    """Weighted average of one target layer (`apply`'s outputs of the experts that have it); see the module's text.

    `add`: readers are summed as well, for maps that carry the shares themselves (ZipIt).
    """
    out = blank(target, like)
    used = [(w, part) for w, part in parts if w > 0]
    if not used:
        return out
    say = row_shares(used, target)
    for name, empty in out.items():
        role = name.split(".")[0]
        if role in ("o", "down"):
            out[name] = sum((w * part[name] for w, part in used), torch.zeros_like(empty))
        elif "norm" in role:
            total = sum(w for w, _ in used)
            out[name] = sum((w / total * part[name] for w, part in used), torch.zeros_like(empty))
        elif add:
            out[name] = sum((part[name] for _, part in used), torch.zeros_like(empty))
        else:
            shape = (-1, *[1] * (empty.dim() - 1))
            out[name] = sum(
                (part[name] * share[role].view(shape) for (_, part), share in zip(used, say, strict=True)),
                torch.zeros_like(empty),
            )
    return out


def row_shares(parts: Sequence[tuple[float, Weights]], target: Spec) -> list[dict[str, Tensor]]:
    """Each expert's say in every row of every map of a layer, by role: of a reader's row, among those that use it."""
    used = [used_rows(part, target) for _, part in parts]
    out: list[dict[str, Tensor]] = []
    for (w, part), has in zip(parts, used, strict=True):
        ones = part["o.weight"].new_ones(target.width)
        say = {"o": w * ones, "down": w * ones}
        for role, mine in has.items():
            total = sum((v * rows[role] for (v, _), rows in zip(parts, used, strict=True)), torch.zeros_like(mine))
            say[role] = w * mine / total.clamp_min(1e-30)
        out.append(say)
    return out


def used_rows(part: Weights, target: Spec) -> dict[str, Tensor]:
    """1 for every row of a reader whose unit something reads, else 0."""
    size, ratio = target.head_size, target.heads // target.kv_heads
    columns = (part["o.weight"] != 0).any(0).view(target.heads, size)
    head = columns.any(1)
    group = head.view(-1, ratio).any(1)
    neuron = (part["down.weight"] != 0).any(0)
    value = columns.view(-1, ratio, size).any(1).flatten()
    rows = {
        "q": head.repeat_interleave(size),
        "k": group.repeat_interleave(size),
        "v": value,
        "gate": neuron,
        "up": neuron,
    }
    return {role: mask.to(part["o.weight"].dtype) for role, mask in rows.items()}
