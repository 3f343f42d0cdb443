"""Anchor padded: one expert widened and deepened to a larger shape without changing what it computes.

The control that a merge must beat: the anchor in the same shape, distilled on the same tokens.
Function-preserving growth (Net2Net: Chen et al. 2016) of a pre-norm RMSNorm decoder of width d to width D:

    residual   c x in the first d dimensions, zero in the rest;  c² = (D/d) · (eps_D/eps_d)
    norms      γ' = γ √(d/D), as  c x / √(c² d/D · ms(x) + eps_D) = √(D/d) · x / √(ms(x) + eps_d)
    heads      size h in H by `align.heads.placement`; q, k times (H/h)^¼ each, as scores are divided by √H
    q, k norms likewise:  c² = (H/h) · (eps_D/eps_d),  γ' = γ √(h/H)
    layers     spread evenly; a new one copies the one before, but writes nothing (LLaMA Pro: Wu et al. 2024)

So the target keeps its own eps. What is new must be able to learn: readers (q, k, v, gate, up, head) of the
new dimensions, heads and neurons are random, at the scale of the anchor's own weights; writers (embedding, o,
down) into or from them are zero.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from polymerge.align import depth
from polymerge.align.heads import placement
from polymerge.errors import PreflightError
from polymerge.model.spec import Spec


@runtime_checkable
class Anchor(Protocol):
    """What `pad` needs of an expert; `model.source.Source` is one."""

    @property
    def spec(self) -> Spec:
        """What it computes."""

    def outer(self) -> dict[str, Tensor]:
        """Weights outside the layers, by role."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """Weights of a layer, by role."""


def pad(
    anchor: Anchor, target: Spec, generator: torch.Generator, *, max_drift: float = 1e-3
) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """The anchor's weights in the shape of `target`, by role (see `model.spec`).

    Yields (None, embedding), then (index, weights) of every layer, then (None, final norm and head).

    Args:
        anchor: a decoder with RMSNorm, rotary positions and a gated MLP.
        target: the result's sizes, biases and rotary frequencies; it may untie the head of a tied anchor.
        generator: of the new readers.
        max_drift: how far, in radians over 64 tokens, a rotary pair may be off.

    Raises:
        PreflightError: another kind of anchor, or a target that cannot hold it without loss.
    """
    _check(anchor.spec, target, max_drift)
    return _Padding(anchor.spec, target, generator).run(anchor)


def _check(spec: Spec, target: Spec, max_drift: float) -> None:
    if not spec.llama_like:
        raise PreflightError(
            f"the padded control needs a llama-like anchor (RMSNorm, rotary positions, gated MLP);"
            f" {spec.family} is not: choose an anchor of the llama, mistral, qwen2 or qwen3 family"
        )
    for key in ("norm", "gated", "parallel", "activation", "rope_scale", "window", "vocab"):
        if getattr(spec, key) != getattr(target, key):
            raise PreflightError(
                f"the target's {key} is {getattr(target, key)!r}, the anchor's {getattr(spec, key)!r};"
                " padding without loss needs the same"
            )
    for key in ("width", "layers", "head_size", "mlp"):
        if getattr(target, key) < getattr(spec, key):
            raise PreflightError(
                f"the target's {key} is {getattr(target, key)}, the anchor's {getattr(spec, key)};"
                " choose a size that holds the anchor"
            )
    if what := unlike(spec, target):
        raise PreflightError(f"{what}: the anchor ({spec.family}) and the target ({target.family}) differ in it")
    if target.tied and not spec.tied:
        raise PreflightError("the target ties its head to the embedding, the anchor does not; untie the target's")
    needed = spec.kv_heads * math.ceil(_ratio(spec) / _ratio(target))
    if needed > target.kv_heads:
        raise PreflightError(
            f"the anchor's heads need {needed} KV heads of {_ratio(target)} query heads each; the target has"
            f" {target.kv_heads}"
        )
    drift = placement(spec, target).worst_angle
    if drift > max_drift:
        raise PreflightError(
            f"a rotary pair of the anchor would be {drift:.3g} radians off after 64 tokens in heads of"
            f" {target.head_size}; choose the anchor's, {spec.head_size}, or a multiple with the same base"
        )


def unlike(spec: Spec, target: Spec) -> str:
    """A feature of an expert that the target has no place for, or norms of q and k that only one has; else empty."""
    lost = sorted(spec.features & {"qkv_bias", "o_bias", "mlp_bias"} - target.features)
    norms = ["qk_norm"] if ("qk_norm" in spec.features) != ("qk_norm" in target.features) else []
    return next(iter(lost + norms), "")


def _ratio(spec: Spec) -> int:
    return spec.heads // spec.kv_heads


class _Padding:
    """Where the anchor's rows and columns go in the target's tensors, and the tensors."""

    def __init__(self, spec: Spec, target: Spec, generator: torch.Generator) -> None:
        self.spec, self.target, self.generator = spec, target, generator
        place = placement(spec, target)
        eps = target.eps / spec.eps if spec.eps else 1.0
        grown = target.head_size / spec.head_size
        self.normed = "qk_norm" in spec.features
        self.stream = math.sqrt(target.width / spec.width * eps)
        self.query = math.sqrt(grown * eps) if self.normed else grown**0.25
        self.temperature = grown**-0.25

        # A KV head with more query heads than the target's groups have is repeated over `parts` groups.
        ratio, slots = _ratio(spec), _ratio(target)
        parts = math.ceil(ratio / slots)
        self.owners = torch.arange(spec.kv_heads).repeat_interleave(parts)
        heads = torch.arange(spec.heads)
        inside = heads % ratio
        self.heads = (heads // ratio * parts + inside // slots) * slots + inside % slots
        self.rotary, self.plain = torch.tensor(place.rotary), torch.tensor(place.plain)

    def run(self, anchor: Anchor) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
        outer = anchor.outer()
        embedding = self._writer(outer["embed.weight"].T, torch.arange(self.spec.vocab), self.spec.vocab).T.contiguous()
        yield None, {"embed.weight": embedding}
        hosts = depth.spread(self.spec.layers, self.target.layers)
        for index in range(self.target.layers):
            before = sum(host <= index for host in hosts) - 1
            weights = self._layer(anchor.layer(max(before, 0)))
            if index not in hosts:
                weights |= {
                    role: torch.zeros_like(w) for role, w in weights.items() if role.split(".")[0] in ("o", "down")
                }
            yield index, weights
        norm = self._norm(outer["norm.weight"])
        if self.target.tied:
            yield None, {"norm.weight": norm / self.stream, "head.weight": embedding}
        else:
            head = outer["head.weight"]
            yield (
                None,
                {"norm.weight": norm, "head.weight": self._reader(head, torch.arange(len(head)), len(head))},
            )

    def _layer(self, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One layer of the target from one of the anchor's."""
        spec, target, size = self.spec, self.target, self.target.head_size
        groups, neurons = torch.arange(len(self.owners)), torch.arange(spec.mlp)
        free = torch.tensor([i for i in range(size) if i not in self.rotary.tolist()], dtype=torch.int64)
        # Free coordinates of an anchor's head add q k to its scores: k is zero there. A norm counts q, too.
        silent_q = _rows(self.heads, free, size) if self.normed else groups[:0]
        readers = {
            "q": (_rows(self.heads, self.rotary, size), target.heads * size, silent_q),
            "k": (_rows(groups, self.rotary, size), target.kv_heads * size, _rows(groups, free, size)),
            "v": (_rows(groups, self.plain, size), target.kv_heads * size, groups[:0]),
            "gate": (neurons, target.mlp, groups[:0]),
            "up": (neurons, target.mlp, groups[:0]),
        }
        out = {"norm1.weight": self._norm(w["norm1.weight"]), "norm2.weight": self._norm(w["norm2.weight"])}
        for role, (rows, total, silent) in readers.items():
            out[f"{role}.weight"] = self._reader(self._grouped(role, w[f"{role}.weight"]), rows, total)
            out[f"{role}.weight"][silent] = 0
            if ("mlp_bias" if role in ("gate", "up") else "qkv_bias") in target.features:
                bias = w.get(f"{role}.bias", w[f"{role}.weight"].new_zeros(len(w[f"{role}.weight"])))
                out[f"{role}.bias"] = _placed(self._grouped(role, bias), rows, total)
        out["o.weight"] = self._writer(w["o.weight"], _rows(self.heads, self.plain, size), target.heads * size)
        out["down.weight"] = self._writer(w["down.weight"], neurons, target.mlp)
        for role, feature in (("o", "o_bias"), ("down", "mlp_bias")):
            if feature in target.features:
                bias = w.get(f"{role}.bias", w["norm1.weight"].new_zeros(spec.width))
                out[f"{role}.bias"] = _placed(bias * self.stream, torch.arange(spec.width), target.width)
        if self.normed:
            for role in ("q_norm.weight", "k_norm.weight"):
                gamma = w[role] * self.temperature
                out[role] = gamma.mean().expand(size).clone()
                out[role][self.rotary] = gamma
        return out

    def _grouped(self, role: str, x: Tensor) -> Tensor:
        """A map or bias with its heads as the target has them: KV heads repeated, queries and keys scaled."""
        if role in ("k", "v"):
            x = x.view(self.spec.kv_heads, -1, *x.shape[1:])[self.owners].flatten(0, 1)
        return x * self.query if role in ("q", "k") else x

    def _norm(self, gamma: Tensor) -> Tensor:
        gamma = gamma * math.sqrt(self.spec.width / self.target.width)
        return torch.cat([gamma, gamma.mean().expand(self.target.width - len(gamma))])

    def _reader(self, x: Tensor, rows: Tensor, total: int) -> Tensor:
        """A map (total, target width) that reads the stream: the anchor's at `rows`, random around it."""
        noise = torch.randn(total, self.target.width, generator=self.generator, dtype=x.dtype)
        out = noise.to(x.device) * x.pow(2).mean().sqrt()
        out[rows, : self.spec.width] = x
        return out

    def _writer(self, x: Tensor, columns: Tensor, total: int) -> Tensor:
        """A map (target width, total) that writes the stream: the anchor's at `columns`, zero around it."""
        out = x.new_zeros(self.target.width, total)
        out[: self.spec.width, columns] = x * self.stream
        return out


def _rows(heads: Tensor, inside: Tensor, size: int) -> Tensor:
    """Positions of the coordinates `inside` each of `heads`, heads of `size` one after another."""
    return (heads[:, None] * size + inside).flatten()


def _placed(x: Tensor, at: Tensor, total: int) -> Tensor:
    out = x.new_zeros(total)
    out[at] = x
    return out
