"""Small decoders that answer at the third token: random weights, and their answers with beginnings computed once.

Prefix deduplication: under the causal mask the states of the first two positions depend on the first operand and the
sign only, so they are computed once for every distinct pair of them (97 pairs instead of 512 in a batch), and the
last layer computes nothing but the answer's position. The logits are those of the plain pass.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from polymerge.model import decoder
from polymerge.model.spec import Spec

Weights = dict[int | None, dict[str, Tensor]]
"""By layer (None: outside the layers), then by role."""
Beginnings = tuple[Int[Tensor, "start 2"], Int[Tensor, " row"]]
"""Distinct beginnings of rows, and which of them each row has."""


def initial(spec: Spec, generator: torch.Generator) -> Weights:
    """Random weights of a llama-like decoder: unit embeddings, uniform maps of variance 1/(3 inputs), unit norms."""

    def uniform(out: int, inputs: int) -> Tensor:
        return (torch.rand(out, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)

    d, q, kv = spec.width, spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    weights: Weights = {None: {"embed.weight": torch.randn(spec.vocab, d, generator=generator)}}
    for layer in range(spec.layers):
        maps = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        maps |= {"gate": (spec.mlp, d), "up": (spec.mlp, d), "down": (d, spec.mlp)}
        weights[layer] = {f"{role}.weight": uniform(*shape) for role, shape in maps.items()}
        weights[layer] |= {"norm1.weight": torch.ones(d), "norm2.weight": torch.ones(d)}
    weights[None] |= {"norm.weight": torch.ones(d), "head.weight": uniform(spec.vocab, d)}
    return weights


def beginnings(rows: Int[Tensor, "row n"]) -> Beginnings:
    """The distinct beginnings of the rows."""
    starts, which = torch.unique(rows[:, :2], dim=0, return_inverse=True)
    return starts, which


def answers(
    spec: Spec, weights: Weights, rows: Int[Tensor, "row n"], begun: Beginnings | None = None
) -> Float[Tensor, "row vocab"]:
    """Logits at the third token of every row, beginnings (`begun`, else those of these rows) computed once each."""
    starts, which = begun or beginnings(rows)
    shared, time_ = 2 * len(starts), starts.shape[1]
    x = decoder.embed(spec, weights[None], torch.cat([starts.flatten(), rows[:, 2]])[None])[0]
    cos, sin = decoder.rotation(spec, time_ + 1, x)
    for layer in range(spec.layers):
        w, last = weights[layer], layer == spec.layers - 1
        n = decoder.read(spec, w, "norm1", x)
        q, k, v = (t[0] for t in decoder.project_heads(spec, w, n[None]))
        q, k, v = (t.unflatten(-1, (-1, spec.head_size)) for t in (q, k, v))  # token head hd
        q, k = _turned(q, cos, sin, shared), _turned(k, cos, sin, shared)
        own = _attend(
            q[shared:, None],
            *(torch.cat([t[:shared].unflatten(0, (-1, 2))[which], t[shared:, None]], 1) for t in (k, v)),
        )
        if last:
            x, mixed = x[shared:], own
        else:
            before = _attend(*(t[:shared].unflatten(0, (-1, 2)) for t in (q, k, v)), causal=True)
            mixed = torch.cat([before, own])
        x = x + decoder.linear(w, "o", mixed)
        n = decoder.read(spec, w, "norm2", x)
        x = x + decoder.linear(w, "down", decoder.feed_forward(spec, w, n[None])[2][0])
    return decoder.logits(spec, weights[None], x[None])[0]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, shared: int) -> Tensor:
    """Rotary embedding of (token, head, hd): the first `shared` tokens stand at positions 0, 1, 0, 1, …; rest at 2."""
    first, rest = torch.arange(shared, device=x.device) % 2, torch.full((len(x) - shared,), 2, device=x.device)
    at = torch.cat([first, rest])
    c, s = cos[at][:, None].to(x.dtype), sin[at][:, None].to(x.dtype)
    pairs = c.shape[-1]
    a, b, plain = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * c - b * s, b * c + a * s, plain], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Attention of (row, time, head, hd), written out: for two or three keys a fused kernel only costs."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = (q[:, :, None] * k[:, None]).sum(-1) / math.sqrt(q.shape[-1])  # row query key head
    if causal:
        later = torch.ones(scores.shape[1:3], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later[None, :, :, None], -math.inf)
    share = scores.softmax(2).to(v.dtype)
    return (share[..., None] * v[:, None]).sum(2).flatten(2).flatten(0, 1)


@torch.no_grad()
def measure(spec: Spec, weights: Weights, rows: Int[Tensor, "row 4"], batch: int = 8192) -> tuple[Tensor, Tensor]:
    """(right, loss) of every row."""
    parts = [(answers(spec, weights, part), part[:, 3]) for part in rows.split(batch)]
    right = torch.cat([logits.argmax(-1) == answer for logits, answer in parts])
    return right, torch.cat([F.cross_entropy(logits.float(), answer, reduction="none") for logits, answer in parts])
