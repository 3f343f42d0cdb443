"""Laws of the rival merge methods, on tiny random experts: what merging with a disguised self must give."""

from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch

from polymerge.align.procrustes import pair_block
from polymerge.calibrate.calibration import Calibration
from polymerge.calibrate.ownership import by_prefix
from polymerge.errors import PreflightError
from polymerge.methods import git_rebasin, linear, orthogonal, ot_fusion, regmean, transport_and_merge, zipit
from polymerge.model import decoder
from polymerge.model.source import Source

EXACT = {
    "linear": linear.Method(),
    "git_rebasin": git_rebasin.Method(),
    "git_rebasin on activations": git_rebasin.Method(match="activations"),
    "ot_fusion, exact plans": ot_fusion.Method(epsilon=0.0),
    "orthogonal": orthogonal.Method(),
    "zipit": zipit.Method(),
    "regmean": regmean.Method(),
    "transport_and_merge, rescaled, exact plans": transport_and_merge.Method(alpha=0.5, epsilon=0.0, rescale=True),
}
"""Methods whose merge of an expert with itself is the expert."""
PERMUTATION = [name for name in EXACT if name != "linear"]
GAUGE = ["orthogonal", "regmean"]
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {}, "tied llama": {"tie_word_embeddings": True}}


def texts(experts=2, rows=24, time=24, vocab=64):
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, vocab, (experts * rows, time), generator=g)
    owner = torch.arange(experts).repeat_interleave(rows)
    fit = (torch.arange(len(tokens)) % 6) != 0
    owned = by_prefix(tokens, owner, experts).double()
    return Calibration(tokens, owner, fit, owned, torch.ones(time, dtype=torch.bool), (1.0,) * experts)


def expert(save_model, folder, family="llama", *, trained=True, **changes):
    """A tiny expert; `trained`: with norm weights that are not all one, as training leaves them."""
    save_model(folder, family, vocab_size=64, eos_token_id=None, **{"initializer_range": 0.15, **changes})
    source = Source(folder, dtype=torch.float64)
    if trained:
        gamma = 0.5 + torch.rand(8, source.spec.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rewrite(source, lambda i, w: scaled_norms(w, gamma, 0 if i is None else i + 1))
    return source


def scaled_norms(w, gamma, index):
    return {r: x * gamma[index] if r in ("norm.weight", "norm1.weight", "norm2.weight") else x for r, x in w.items()}


def rewrite(source, change):
    """Change what a source gives: `change(layer or None, weights)`."""
    outer, layer = source.outer, source.layer
    source.outer = lambda: change(None, outer())
    source.layer = lambda i: change(i, layer(i))
    return source


def merged(method, experts, target, anchor=0, data=None):
    """Weights by layer, and logits on the calibration rows."""
    data = data or texts(len(experts))
    weights = defaultdict(dict)
    method.merge(experts, anchor, target, data, lambda i, w: weights[i].update(w), 0)
    x = decoder.embed(target, weights[None], data.tokens)
    for index in range(target.layers):
        x = decoder.layer(target, weights[index], x).out
    return decoder.logits(target, weights[None], x), weights, data


def gap(logits, source, data):
    return float((logits - source.logits(data.tokens)).abs().max())


def rotation(n, g):
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


def disguised(source, kind, seed=3):
    """The same function in other coordinates.

    "permutation": stream, KV groups, query heads and neurons in another order. "gauge": all that the architecture
    leaves free (no q/k norms): the stream rotated, neurons scaled and flipped, rotary pairs turned and scaled, values
    rotated and scaled.
    """
    spec, g = source.spec, torch.Generator().manual_seed(seed)
    gauge = kind == "gauge"
    eye = torch.eye(spec.width, dtype=torch.float64)
    p = rotation(spec.width, g) if gauge else eye[torch.randperm(spec.width, generator=g)]
    free = [Free.draw(spec, g, gauge) for _ in range(spec.layers)]

    def change(index, w):
        w = absorbed(w) if gauge else {r: x @ p if r.startswith("norm") else x for r, x in w.items()}
        if index is not None:
            return free[index].apply(w, p, spec)
        return w | {r: w[r] @ p for r in ("embed.weight", "head.weight")}

    return rewrite(twin(source), change)


def twin(source):
    copy = Source(source.path, dtype=torch.float64)
    copy.outer, copy.layer = source.outer, source.layer
    return copy


def absorbed(w):
    """γ in the readers, ones in the norms."""
    readers = {"norm": ("head",), "norm1": "qkv", "norm2": ("gate", "up")}
    w = dict(w)
    for norm, roles in readers.items():
        if f"{norm}.weight" in w:
            w |= {f"{r}.weight": w[f"{r}.weight"] * w[f"{norm}.weight"] for r in roles}
            w[f"{norm}.weight"] = torch.ones_like(w[f"{norm}.weight"])
    return w


@dataclass(frozen=True)
class Free:
    """What is drawn freely inside a layer: orders, neuron scales, and blocks (group, hd, hd) of q, k, v."""

    groups: torch.Tensor
    heads: torch.Tensor
    neurons: torch.Tensor
    scale: torch.Tensor
    blocks: dict

    @staticmethod
    def draw(spec, g, gauge):
        size, ratio, n = spec.head_size, spec.heads // spec.kv_heads, spec.kv_heads
        groups, order = torch.randperm(n, generator=g), torch.randperm(ratio, generator=g)
        blocks = {role: torch.eye(size, dtype=torch.float64).repeat(n, 1, 1) for role in "qkv"}
        scale = torch.ones(spec.mlp, dtype=torch.float64)
        if gauge:
            z = [torch.polar(*torch.rand(2, size // 2, generator=g).double().mul(3).add(0.5)) for _ in range(n)]
            blocks = {"q": torch.stack([pair_block(x) for x in z]),
                      "k": torch.stack([pair_block(1 / x.conj()) for x in z]),
                      "v": torch.stack([1.7 * rotation(size, g) for _ in z])}  # fmt: skip
            sign = torch.randint(0, 2, (spec.mlp,), generator=g) * 2 - 1
            scale = (0.5 + torch.rand(spec.mlp, generator=g).double()) * sign
        heads = (groups[:, None] * ratio + order).flatten()
        return Free(groups, heads, torch.randperm(spec.mlp, generator=g), scale, blocks)

    def apply(self, w, p, spec):
        size, ratio = spec.head_size, spec.heads // spec.kv_heads
        out = {r: x for r, x in w.items() if "norm" in r}
        for role, order in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
            block = self.blocks[role].repeat_interleave(ratio if role == "q" else 1, 0)
            moved = block.transpose(1, 2) @ (w[f"{role}.weight"] @ p).unflatten(0, (-1, size))
            out[f"{role}.weight"] = moved[order].flatten(0, 1)
            if f"{role}.bias" in w:
                bias = block.transpose(1, 2) @ w[f"{role}.bias"].view(-1, size, 1)
                out[f"{role}.bias"] = bias[order].flatten()
        back = torch.linalg.inv(self.blocks["v"]).repeat_interleave(ratio, 0)
        out["o.weight"] = p.T @ (back @ w["o.weight"].T.unflatten(0, (-1, size)))[self.heads].flatten(0, 1).T
        out["gate.weight"] = w["gate.weight"][self.neurons] @ p
        out["up.weight"] = (w["up.weight"] * self.scale[:, None])[self.neurons] @ p
        out["down.weight"] = p.T @ (w["down.weight"] / self.scale)[:, self.neurons]
        return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXACT)
def test_merge_of_an_expert_with_itself_is_the_expert(name, family, save_model, tmp_path):
    source = expert(save_model, tmp_path, family.split()[-1], **FAMILIES[family])
    logits, _, data = merged(EXACT[name], [source, source], source.spec)
    assert gap(logits, source, data) < 1e-6


@pytest.mark.parametrize("kind", ["permutation", "gauge"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_disguise_changes_nothing(family, kind, save_model, tmp_path):
    source = expert(save_model, tmp_path, family)
    data = texts()
    assert gap(disguised(source, kind).logits(data.tokens), source, data) < 1e-9


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "tied llama"])
@pytest.mark.parametrize("name", EXACT)
def test_merge_with_a_permuted_self(name, family, seed, save_model, tmp_path):
    """Streams, KV groups, heads and neurons permuted: undone by every method that aligns, and by no other."""
    source = expert(save_model, tmp_path, family.split()[-1], **FAMILIES[family])
    logits, _, data = merged(EXACT[name], [source, disguised(source, "permutation", seed)], source.spec)
    if name in PERMUTATION:
        assert gap(logits, source, data) < 1e-6
    else:
        assert gap(logits, source, data) > 0.1


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", EXACT)
def test_merge_with_a_rotated_self(name, family, seed, save_model, tmp_path):
    """All that the architecture leaves free: undone by orthogonal alignment, and by nothing that permutes."""
    source = expert(save_model, tmp_path, family)
    logits, _, data = merged(EXACT[name], [source, disguised(source, "gauge", seed)], source.spec)
    if name in GAUGE:
        assert gap(logits, source, data) < 1e-6
    else:
        assert gap(logits, source, data) > 0.1
