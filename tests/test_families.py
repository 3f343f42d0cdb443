"""Every family: the table claims all that is stored, and the engine computes what transformers computes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from polymerge import families
from polymerge.checkpoint.reader import Checkpoint
from polymerge.errors import FamilyError
from polymerge.model.source import Source, pack, read_config, unpack


def save_tiny(name, folder, **changes):
    """A random model of the family's tiny config with no weight at a special value (norms, biases)."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**families.get(name).tiny, **changes}),
        attn_implementation="eager" if name.startswith("gemma") else "sdpa",  # the other knows no caps
    )
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    return model


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0] * 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}

VARIANTS = [(name, {}) for name in families.names()] + [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
    ("mistral", {"sliding_window": None}),
    ("qwen3", {"attention_bias": True}),
    ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ("gemma", {"attention_bias": True, "tie_word_embeddings": False}),
    ("gemma2", {"attention_bias": True, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", {"final_logit_softcapping": 3.0}),
    ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False, "sliding_window_pattern": 2}),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}),
    ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    ("olmo3", {"rope_parameters": {"full_attention": YARN}}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 6}),
    ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("phi3", {"sliding_window": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    ("stablelm", {"use_qkv_bias": False, "tie_word_embeddings": True}),
    ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_logits_are_those_of_transformers(name, changes, tmp_path, monkeypatch):
    model = save_tiny(name, tmp_path, **changes)
    source = Source(tmp_path, dtype=torch.float64)
    tokens = torch.randint(0, 48, (3, 17))
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)  # transformers' norms go through float32, even in float64
        expected = model(tokens).logits
    # A Gemma's norms say .float(), which cannot be patched so.
    close = 1e-5 if name.startswith("gemma") else 1e-9
    torch.testing.assert_close(source.logits(tokens), expected, atol=close, rtol=0)
    assert source.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", families.names())
def test_pack_undoes_unpack(name, tmp_path):
    save_tiny(name, tmp_path)
    source = Source(tmp_path, dtype=torch.float64)
    for row in source._rows():
        tensor = source.checkpoint.tensor(source._name(row, 0))
        torch.testing.assert_close(pack(row, unpack(row, tensor, source.spec), source.spec), tensor, atol=1e-15, rtol=0)


PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
"""Written by hand after published models of these names: keys that no config of our own making has."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    _, config, spec = read_config(Checkpoint(tmp_path))
    assert spec.width == config.hidden_size
    assert 2 * len(spec.frequencies) in (spec.head_size, spec.head_size // 4)
    assert len(spec.each) in (0, spec.layers)


def test_layers_that_differ_as_published(tmp_path):
    specs = {}
    for name in ("gemma-3-270m", "Olmo-3-7B", "SmolLM3-3B"):
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
        specs[name] = read_config(Checkpoint(tmp_path))[2]
    gemma, olmo, smol = specs.values()
    assert [i for i, (_, _, window) in enumerate(gemma.each) if window is None] == [5, 11, 17]
    assert gemma.at(5).frequencies[1] == pytest.approx(1e6 ** (-1 / 128))
    assert gemma.at(4).frequencies[1] == pytest.approx(1e4 ** (-1 / 128))
    assert [i for i, (frequencies, _, _) in enumerate(smol.each) if not frequencies] == list(range(3, 36, 4))
    assert {olmo.at(i).rope_scale for i in range(3)} == {1.0}
    assert olmo.at(3).rope_scale == pytest.approx(1.2079441541679836)


def permute_neurons(weights):
    order = torch.randperm(len(weights["up.weight"]))
    for role in ("up.weight", "up.bias", "gate.weight", "gate.bias"):
        if role in weights:
            weights[role] = weights[role][order]
    weights["down.weight"] = weights["down.weight"][:, order]


def permute_heads(weights, spec):
    order = torch.randperm(spec.kv_heads)
    group = spec.heads // spec.kv_heads

    def move(x, per):
        return x.unflatten(0, (spec.kv_heads, per))[order].flatten(0, 1)

    for kind in ("weight", "bias"):
        for role, per in (("q", group * spec.head_size), ("k", spec.head_size), ("v", spec.head_size)):
            if f"{role}.{kind}" in weights:
                weights[f"{role}.{kind}"] = move(weights[f"{role}.{kind}"], per)
            if f"{role}_norm_all.{kind}" in weights:
                weights[f"{role}_norm_all.{kind}"] = move(weights[f"{role}_norm_all.{kind}"], per)
    weights["o.weight"] = move(weights["o.weight"].T, group * spec.head_size).T


@pytest.mark.parametrize("name", families.names())
def test_permuting_a_free_axis_changes_nothing(name, tmp_path, monkeypatch):
    save_tiny(name, tmp_path)
    source = Source(tmp_path, dtype=torch.float64)
    tokens = torch.randint(0, 48, (2, 11))
    before = source.logits(tokens)
    plain = Source.layer

    def permuted(self, index):
        weights = plain(self, index)
        permute_neurons(weights)
        permute_heads(weights, self.spec)
        return weights

    monkeypatch.setattr(Source, "layer", permuted)
    torch.testing.assert_close(source.logits(tokens), before, atol=1e-11, rtol=0)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
    """Other weights in a checkpoint: those that `change` makes of them."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(weights | change(weights), folder / "model.safetensors")


def test_unknown_config_key_is_refused_by_name(tmp_path):
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, clip_qkv=8.0)
    with pytest.raises(FamilyError, match=r"'clip_qkv' is 8\.0"):
        Source(tmp_path)


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_parameters"])
def test_part_of_a_head_rotated_is_refused_where_transformers_rotates_all_of_it(key, tmp_path):
    part = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    for name in ("llama", "stablelm"):
        save_tiny(name, tmp_path / name)
        edit_config(tmp_path / name, **{key: part.get(key, part)})
    assert len(Source(tmp_path / "stablelm").spec.frequencies) in (1, 2)  # of 4 pairs; the first is its own default
    with pytest.raises(FamilyError, match=r"'partial_rotary_factor' is 0\.5, which the llama table does not know"):
        Source(tmp_path / "llama")


def test_an_activation_that_nobody_knows_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, hidden_act="foo")
    with pytest.raises(FamilyError, match="activation 'foo' is none that transformers knows"):
        Source(tmp_path)


def test_weights_that_are_no_floating_point_are_refused(tmp_path):
    save_tiny("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda weights: {name: weights[name].to(torch.int8)})
    with pytest.raises(FamilyError, match=r"up_proj\.weight' is stored as torch\.int8; expected floating point"):
        Source(tmp_path)


@pytest.mark.parametrize(("value", "known"), [(False, True), (None, True), (True, False)])
def test_a_key_that_transformers_does_not_know_may_say_no(value, known, tmp_path):
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, rope_interleaved=value)
    if known:
        Source(tmp_path)
    else:
        with pytest.raises(FamilyError, match="'rope_interleaved' is True"):
            Source(tmp_path)


@pytest.mark.parametrize("another", [False, True])
def test_a_stored_head_counts_where_it_is_not_the_embedding(another, tmp_path):
    """As transformers has it, whatever `tie_word_embeddings` says."""
    save_tiny("llama", tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda w: {"lm_head.weight": w["model.embed_tokens.weight"] * (-1.0 if another else 1.0)})
    source = Source(tmp_path, dtype=torch.float64)
    tokens = torch.randint(0, source.spec.vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(tokens).logits
    torch.testing.assert_close(source.logits(tokens), theirs, atol=1e-4, rtol=0)
    assert source.spec.tied is not another


@pytest.mark.parametrize(
    ("kind", "message"), [("gemma3", "no family 'gemma3'; known: gemma, gemma2"), (None, "no `model_type`")]
)
def test_an_unknown_family_is_not_taken_for_its_neighbour(kind, message, tmp_path):
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, model_type=kind)
    with pytest.raises(FamilyError, match=message) as caught:
        Source(tmp_path)
    assert "did you mean" not in str(caught.value)


def test_config_keys_of_other_tools_say_nothing(tmp_path):
    save_tiny("llama", tmp_path)
    said = {"_attn_implementation_autoset": True, "transformers.js_config": {"dtype": "q4"}, "mergekit_version": "0.1",
            "trust_remote_code": True, "neftune_noise_alpha": 5, "rotary_scaling_factor": 1.0}  # fmt: skip
    edit_config(tmp_path, **said)
    Source(tmp_path)
    edit_config(tmp_path, rotary_scaling_factor=2.0)
    with pytest.raises(FamilyError, match=r"'rotary_scaling_factor' is 2\.0"):
        Source(tmp_path)


def test_a_quantised_model_is_refused_as_such(tmp_path):
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, clip_qkv=8.0, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(FamilyError, match=r"the model is quantised .*; merge the one from before"):
        Source(tmp_path)


def test_unclaimed_tensor_is_refused_by_name(tmp_path):
    save_tiny("llama", tmp_path)
    rewrite(tmp_path, lambda _: {"model.layers.0.mlp.extra.weight": torch.ones(2)})
    with pytest.raises(FamilyError, match=r"mlp\.extra\.weight"):
        Source(tmp_path)


def test_shape_that_contradicts_the_config_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, intermediate_size=44)
    with pytest.raises(FamilyError, match=r"gate_proj.*shape \(40, 32\).*\(44, 32\)"):
        Source(tmp_path)


def test_window_per_layer_is_refused(tmp_path):
    save_tiny("qwen2", tmp_path)
    edit_config(tmp_path, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(FamilyError, match="use_sliding_window"):
        Source(tmp_path)
