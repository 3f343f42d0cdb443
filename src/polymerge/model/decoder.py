"""One decoder for every family: runs a layer from its spec and canonical weights, and shows what happens inside.

Shapes: tokens (batch, time); residual stream (batch, time, resid); queries (batch, time, head * hd) before the
rotation. All functions are pure and differentiable; weights are a mapping from role to tensor (see `spec.py`).
Checked against transformers' logits for every family in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers.activations import ACT2FN

from polymerge.model.spec import Spec

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trace:
    """The activations of one layer, by role; `mixed` is what o reads, `hidden` what down reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    mixed: Tensor
    mid: Tensor
    gate: Tensor | None
    up: Tensor
    hidden: Tensor
    out: Tensor


def activation(name: str, x: Tensor) -> Tensor:
    """The activation that a config names."""
    y: Tensor = ACT2FN[name](x)
    return y


def normalise(
    spec: Spec, x: Float[Tensor, "... resid"], weight: Tensor | None = None, bias: Tensor | None = None
) -> Float[Tensor, "... resid"]:
    """RMSNorm or LayerNorm along the residual axis; without a weight, the bare normalisation."""
    if spec.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
    return rms(x, spec.eps) if weight is None else weight * rms(x, spec.eps)


def rms(x: Float[Tensor, "... n"], eps: float) -> Float[Tensor, "... n"]:
    """X over its root mean square (Zhang & Sennrich 2019), in float32 at least, as transformers does."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def linear(w: Weights, role: str, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
    """Apply the map of a role, with its bias where it has one."""
    return F.linear(x, w[f"{role}.weight"], w.get(f"{role}.bias"))


def rotation(spec: Spec, time: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (time, pair), computed in float32 as transformers does, then cast."""
    pairs = _on(like.device, spec.frequencies)
    angle = torch.arange(time, dtype=torch.float32, device=like.device)[:, None] * pairs[None]
    return (angle.cos() * spec.rope_scale).to(like.dtype), (angle.sin() * spec.rope_scale).to(like.dtype)


@lru_cache(maxsize=64)
def _on(device: torch.device, frequencies: tuple[float, ...]) -> Float[Tensor, " pair"]:
    """The frequencies on a device: copied once, since a copy from the host waits for a GPU."""
    return torch.tensor(frequencies, dtype=torch.float32, device=device)


def rotate(
    x: Float[Tensor, "batch head time hd"], cos: Float[Tensor, "time pair"], sin: Float[Tensor, "time pair"]
) -> Float[Tensor, "batch head time hd"]:
    """Rotary embedding: pair i is (x_i, x_{i + pairs}); what lies past the pairs is left alone."""
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attend(
    spec: Spec,
    q: Float[Tensor, "batch time q"],
    k: Float[Tensor, "batch time kv"],
    v: Float[Tensor, "batch time kv"],
) -> Float[Tensor, "batch time q"]:
    """Causal attention of every head (grouped KV heads, rotation, window); what o_proj reads."""
    batch, time, _ = q.shape

    def split(x: Tensor) -> Tensor:
        return x.view(batch, time, -1, spec.head_size).transpose(1, 2)

    heads, keys, values = split(q), split(k), split(v)
    if spec.frequencies:
        cos, sin = rotation(spec, time, q)
        heads, keys = rotate(heads, cos, sin), rotate(keys, cos, sin)
    mask = None
    if (spec.window is not None and spec.window < time) or spec.score_cap is not None:
        distance = torch.arange(time, device=q.device)[:, None] - torch.arange(time, device=q.device)[None]
        mask = (distance >= 0) & (distance < (spec.window or time))
    if mask is not None and spec.score_cap is not None:
        keys, values = (x.repeat_interleave(heads.shape[1] // x.shape[1], dim=1) for x in (keys, values))
        scores = capped(heads @ keys.mT / spec.head_size**0.5, spec.score_cap).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ values).transpose(1, 2).reshape(batch, time, -1)
    out = F.scaled_dot_product_attention(
        heads,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=keys.shape[1] != heads.shape[1],
    )
    return out.transpose(1, 2).reshape(batch, time, -1)


def read(spec: Spec, w: Weights, norm: str, x: Float[Tensor, "... resid"]) -> Float[Tensor, "... resid"]:
    """What attention (`norm1`), the MLP (`norm2`) or the head (`norm`) reads: the stream itself without such a norm."""
    weight = w.get(f"{norm}.weight")
    return x if weight is None else normalise(spec, x, weight, w.get(f"{norm}.bias"))


def written(spec: Spec, w: Weights, role: str, x: Float[Tensor, "... n"]) -> Float[Tensor, "... resid"]:
    """What o or down adds to the stream, normalised where the family has a norm behind it."""
    out, weight = linear(w, role, x), w.get(f"{role}_norm.weight")
    return out if weight is None else weight * rms(out, spec.eps)


def project_heads(spec: Spec, w: Weights, n: Float[Tensor, "batch time resid"]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as attention sees them before the rotation (normalised, per head or as one, in some)."""
    q, k, v = linear(w, "q", n), linear(w, "k", n), linear(w, "v", n)
    if "qk_norm_all" in spec.features:
        q, k = (w[f"{role}_norm_all.weight"] * rms(x, spec.eps) for role, x in (("q", q), ("k", k)))
    if "qk_norm" in spec.features:
        q, k = (
            (w[f"{role}_norm.weight"] * rms(x.unflatten(-1, (-1, spec.head_size)), spec.eps)).flatten(-2)
            for role, x in (("q", q), ("k", k))
        )
    return q, k, v


def feed_forward(spec: Spec, w: Weights, n: Float[Tensor, "batch time resid"]) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gate and up projections before the activation, and the hidden units that down reads."""
    up = linear(w, "up", n)
    if not spec.gated:
        return None, up, activation(spec.activation, up)
    gate = linear(w, "gate", n)
    return gate, up, activation(spec.activation, gate) * up


def layer(spec: Spec, w: Weights, x: Float[Tensor, "batch time resid"]) -> Trace:
    """One decoder layer; `spec.at` it, where layers differ."""
    q, k, v = project_heads(spec, w, read(spec, w, "norm1", x))
    mixed = attend(spec, q, k, v)
    mid = x + written(spec, w, "o", mixed)
    gate, up, hidden = feed_forward(spec, w, read(spec, w, "norm2", x if spec.parallel else mid))
    return Trace(q, k, v, mixed, mid, gate, up, hidden, mid + written(spec, w, "down", hidden))


def capped(x: Tensor, cap: float | None) -> Tensor:
    """C tanh(x / c): nearly x where it is small, never above c (Gemma 2)."""
    return x if cap is None else cap * torch.tanh(x / cap)


def embed(spec: Spec, w: Weights, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time resid"]:
    """The first residual state."""
    x = F.embedding(tokens, w["embed.weight"])
    if "positions" in spec.features:
        x = x + w["positions.weight"][: tokens.shape[1]]
    return x


def logits(spec: Spec, w: Weights, x: Float[Tensor, "batch time resid"]) -> Float[Tensor, "batch time vocab"]:
    """Final norm and head, and the cap where the family has one."""
    found = F.linear(read(spec, w, "norm", x), w["head.weight"])
    return capped(found, spec.logit_cap)
