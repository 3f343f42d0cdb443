"""The padded control: a larger shape computes what the anchor computes, and all that is new can learn."""

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from polymerge import families
from polymerge.errors import PreflightError
from polymerge.methods._pad import pad
from polymerge.model import decoder
from polymerge.model.source import Source
from polymerge.model.spec import CANONICAL, Spec

TOKENS = torch.randint(0, 48, (3, 23), generator=torch.Generator().manual_seed(0))


def save(folder, family, **changes):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**families.get(family).tiny, **changes})
    model = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    return Source(folder, dtype=torch.float64)


@dataclass
class Padded:
    spec: Spec
    outer: dict
    layers: dict

    def logits(self, tokens):
        x = decoder.embed(self.spec, self.outer, tokens)
        for index in range(self.spec.layers):
            x = decoder.layer(self.spec, self.layers[index], x).out
        return decoder.logits(self.spec, self.outer, x)


def padded(anchor, target, seed=0):
    outer, layers = {}, {}
    for index, weights in pad(anchor, target, torch.Generator().manual_seed(seed)):
        if index is None:
            outer |= weights
        else:
            layers[index] = weights
    return Padded(target, outer, layers)


def larger(spec, factor=1, **changes):
    """A larger shape; in heads `factor` times as large the anchor's frequencies are among the new."""
    slots = []
    for frequency in spec.frequencies:
        slots += [frequency, *(frequency * 0.7 / i for i in range(1, factor))]
    sizes = {"width": 52, "layers": 5, "heads": 12, "kv_heads": 6, "mlp": 61, **changes}
    return replace(spec, head_size=spec.head_size * factor, frequencies=tuple(slots), **sizes)


VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {}),
    ("qwen3", {"attention_bias": True}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("phi3", {}),
]


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_are_the_anchors(family, changes, factor, tmp_path):
    anchor = save(tmp_path, family, **changes)
    model = padded(anchor, larger(anchor.spec, factor))
    torch.testing.assert_close(model.logits(TOKENS), anchor.logits(TOKENS), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 40},
        {"heads": 4, "kv_heads": 4},
        {"heads": 15, "kv_heads": 3},
        {"eps": 1e-3},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_any_grouping_and_epsilon_is_exact(family, changes, tmp_path):
    anchor = save(tmp_path, family)
    model = padded(anchor, larger(anchor.spec, **changes))
    torch.testing.assert_close(model.logits(TOKENS), anchor.logits(TOKENS), atol=1e-9, rtol=0)


def test_four_query_heads_a_group_split_over_smaller_groups(tmp_path):
    anchor = save(tmp_path, "llama", num_attention_heads=8, num_key_value_heads=2)
    model = padded(anchor, larger(anchor.spec, heads=18, kv_heads=6))
    torch.testing.assert_close(model.logits(TOKENS), anchor.logits(TOKENS), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["llama", "granite"])  # a Granite's tied head is not its embedding, but for a factor
def test_a_tied_anchor_fits_an_untied_target_and_biases_may_be_added(family, tmp_path):
    anchor = save(tmp_path, family, tie_word_embeddings=True)
    features = frozenset({"head", "qkv_bias", "o_bias", "mlp_bias"})
    model = padded(anchor, larger(anchor.spec, tied=False, features=features))
    torch.testing.assert_close(model.logits(TOKENS), anchor.logits(TOKENS), atol=1e-9, rtol=0)
    assert {f"{role}.bias" for role in ("q", "k", "v", "o", "gate", "up", "down")} <= set(model.layers[0])


def test_float32_is_exact_to_its_precision(tmp_path):
    save(tmp_path, "llama")
    anchor = Source(tmp_path)
    model = padded(anchor, larger(anchor.spec, 2))
    expected = anchor.logits(TOKENS)
    torch.testing.assert_close(model.logits(TOKENS), expected, atol=2e-6 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shapes_are_the_targets(family, tmp_path):
    from polymerge.model.spec import axis_lengths

    anchor = save(tmp_path, family)
    model = padded(anchor, larger(anchor.spec))
    sizes = model.spec.sizes()
    for weights in (model.outer, *model.layers.values()):
        for role, w in weights.items():
            assert tuple(w.shape) == axis_lengths(CANONICAL[role], sizes), role
            assert w.dtype == torch.float64


def test_everything_new_can_learn(tmp_path):
    """After one step of the writers no parameter is without a gradient."""
    anchor = save(tmp_path, "llama")
    model = padded(anchor, larger(anchor.spec))
    every = [w for weights in (model.outer, *model.layers.values()) for w in weights.values()]
    touched = [torch.zeros_like(w, dtype=torch.bool) for w in every]
    goal = torch.randn(3, 23, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for w in every:
            w.requires_grad_(requires_grad=True)
        gradients = torch.autograd.grad((model.logits(TOKENS) * goal).sum(), every)
        with torch.no_grad():
            for w, g, t in zip(every, gradients, touched, strict=True):
                t.logical_or_(g != 0)
                w.sub_(1e-4 * g)
    seen = TOKENS.unique()
    touched[0] = touched[0][seen]  # an embedding of a token that never came cannot
    assert all(bool(t.all()) for t in touched)


def test_seeded(tmp_path):
    anchor = save(tmp_path, "llama")
    one, two, other = (padded(anchor, larger(anchor.spec), seed).layers[0]["q.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "olmo2", "gemma3_text", "smollm3"])
def test_other_kinds_of_anchor_are_refused(family, tmp_path):
    anchor = save(tmp_path, family)
    with pytest.raises(PreflightError, match="the padded control needs a llama-like anchor"):
        pad(anchor, anchor.spec, torch.Generator())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 31}, "width is 31"),
        ({"layers": 1}, "layers is 1"),
        ({"mlp": 39}, "mlp is 39"),
        ({"vocab": 49}, "vocab is 49"),
        ({"activation": "gelu"}, "activation"),
        ({"window": 5}, "window"),
        ({"tied": True}, "ties its head"),
        ({"heads": 3, "kv_heads": 3}, "need 2 KV heads|need 4 KV heads"),
        ({"frequencies": (1.0, 0.3, 0.1, 0.03)}, "radians off"),
        ({"features": frozenset({"head", "qk_norm"})}, "qk_norm"),
    ],
)
def test_targets_that_would_lose_something_are_refused(changes, named, tmp_path):
    anchor = save(tmp_path, "llama")
    with pytest.raises(PreflightError, match=named):
        pad(anchor, replace(larger(anchor.spec), **changes), torch.Generator())


def test_a_bias_that_the_target_lacks_is_refused(tmp_path):
    anchor = save(tmp_path, "qwen2")
    with pytest.raises(PreflightError, match="qkv_bias"):
        pad(anchor, larger(anchor.spec, features=frozenset({"head"})), torch.Generator())
