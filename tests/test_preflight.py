"""Preflight: what it tells of each difference between experts, and what it refuses before a byte is written.

Several cases are merges that other tools carry out without a word, with garbage as the result: other
tokenizers of one size, other head counts in equal shapes, other rotary bases, biases without a place, a
result that depends on the order of a set.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, save_tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from polymerge import plan, preflight
from polymerge.align.heads import placement
from polymerge.calibrate.texts import read_skill
from polymerge.checkpoint import place
from polymerge.errors import CheckpointError, OutputError, PreflightError, RecipeError, TextError
from polymerge.model.source import Source
from polymerge.preflight import architecture
from polymerge.recipe import LEAN, parse


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name, family, **config)`: a tiny model, saved once."""
    folder, known = tmp_path_factory.mktemp("models"), {}

    def make(name, family="llama", **changes):
        if name not in known:
            known[name] = save_tiny_model(folder / name, family, **changes)
        return known[name]

    return make


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files without a line in common."""
    folder = tmp_path_factory.mktemp("texts")
    for name, word in (("a", "apple"), ("b", "brick")):
        (folder / f"{name}.txt").write_text("".join(f"{word} number {i * i}\n" for i in range(500)))
    return folder


@pytest.fixture
def look(texts, tmp_path):
    """Preflight of two experts, "a" the anchor."""

    def run(a, b, *, tokenizers=None, out=None, changes=None, **keys):
        folders = {"a": a, "b": b}
        files = {k: str(texts / f"{k}.txt") for k in folders} | (changes or {})
        recipe = parse(
            {
                "method": "fold",
                "anchor": "a",
                "experts": {k: {"model": str(f), "text": files[k]} for k, f in folders.items()},
                **({} if keys.get("method") else {"size": "union"}),
                "fold": {"length": 32, "tokens": 640},
                "dtype": "float32",
                **keys,
            }
        )
        sources = {k: Source(f) for k, f in folders.items()}
        specs, sizes = ({k: getattr(s, n) for k, s in sources.items()} for n in ("spec", "parameters"))
        shapes = None if recipe.method == "union" else plan.make(recipe, specs, sizes)
        skills = {k: read_skill(k, e.text) for k, e in recipe.experts.items()}
        loaded = {k: AutoTokenizer.from_pretrained(f) for k, f in folders.items()} | (tokenizers or {})
        return preflight.check(recipe, sources, loaded, shapes, out or tmp_path / "out", skills)

    return run


def found(report, subject):
    """Level and text of the one finding on a subject."""
    matches = [(f.level, f.text) for f in report.findings if f.subject == subject]
    assert len(matches) == 1, (subject, [f.subject for f in report.findings])
    return matches[0]


def subjects(report):
    return {f.subject for f in report.findings}


def refused(error, look, *needles, **arguments):
    with pytest.raises(error) as caught:
        look(**arguments)
    assert "\n" not in str(caught.value)
    for needle in needles:
        assert needle in str(caught.value), str(caught.value)


# ------------------------------------------------------------------------------------------ tokenizers


def bpe(vocabulary, merges=(), pre_tokenizer=None, **special):
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def alphabet():
    return {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def test_same_size_other_tokens_is_refused(look, made):
    vocabulary = alphabet()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other, model = bpe(vocabulary, eos_token="<|endoftext|>"), made("llama")
    assert len(other) == len(byte_tokenizer())
    first = min(vocabulary["a"], vocabulary["b"])
    refused(
        PreflightError, look, f"id {first} is 'a' and 'b'", "'a' and 'b' differ", "one tokenizer",
        a=model, b=model, tokenizers={"b": other}, method="linear",
    )  # fmt: skip


def test_other_size_is_refused(look, made):
    larger = bpe({**alphabet(), "ab": 256}, [("a", "b")], eos_token="<|endoftext|>")
    model = made("wide", vocab_size=260)
    refused(PreflightError, look, "id 256 is '<|endoftext|>' and 'ab'", "sizes 257 and 258",
            a=model, b=model, tokenizers={"b": larger}, method="linear")  # fmt: skip


def test_a_fold_says_what_it_makes_of_another_tokenizer(look, made):
    larger = bpe({**alphabet(), "ap": 256, "app": 257}, [("a", "p"), ("ap", "p")], eos_token="<|endoftext|>")
    model = made("wide", vocab_size=260)
    level, text = found(look(model, model, tokenizers={"b": larger}), "b: tokenizer")
    assert level == "approximate"
    assert "another tokenizer (259 tokens, 257 of the result's 257" in text


def test_same_tokens_cut_in_other_places_are_refused(look, made):
    vocabulary = {**alphabet(), "pp": 256, "ppl": 257, "pl": 258}
    model = made("wide", vocab_size=260)
    one = bpe(vocabulary, [("p", "p"), ("pp", "l"), ("p", "l")])
    other = bpe(vocabulary, [("p", "l"), ("p", "p"), ("pp", "l")])
    assert one.tokenize("apple") != other.tokenize("apple")
    refused(
        PreflightError, look, "same tokens, but texts are cut in other places", "ids [257, ", "and [79, 258",
        a=model, b=model, tokenizers={"a": one, "b": other}, method="linear",
    )  # fmt: skip


def test_other_description_with_the_same_effect_is_a_warning(look, made):
    step = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other = bpe(alphabet(), pre_tokenizer=pre_tokenizers.Sequence([step]), eos_token="<|endoftext|>")
    level, text = found(look(made("llama"), made("llama"), tokenizers={"b": other}), "b: tokenizer")
    assert level == "warning"
    assert "pre_tokenizer differs" in text


def test_other_special_roles_are_a_warning(look, made):
    other = bpe(alphabet(), bos_token="<|endoftext|>")
    report = look(made("llama"), made("llama"), tokenizers={"b": other})
    notes = [f.text for f in report.of("warning") if f.subject == "b: tokenizer"]
    assert any("eos" in note for note in notes)
    assert "tokenizer" not in subjects(report)


def test_how_far_into_a_text_is_looked_is_told(look, made):
    level, text = found(look(made("llama"), made("llama")), "fold.length")
    assert level == "approximate"
    assert "rows of 32 tokens, the result states 128 positions" in text
    whole = look(made("llama"), made("llama"), fold={"length": 128, "tokens": 640})
    assert "fold.length" not in subjects(whole)


def test_another_chat_template_is_a_warning(look, made):
    plain, mine, other = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    mine.chat_template, other.chat_template = "{{ messages }}", "{{ messages }}!"
    told = {"b: chat template"}
    for one, two, expected in ((mine, mine, set()), (mine, plain, set()), (mine, other, told), (plain, mine, told)):
        report = look(made("llama"), made("llama"), tokenizers={"a": one, "b": two})
        assert {f.subject for f in report.of("warning") if "template" in f.subject} == expected


def test_beginning_of_text_is_compared(look, made):
    other = bpe(alphabet(), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    report = look(made("llama"), made("llama"), tokenizers={"b": other})
    told = "'b' begins every text with '<|endoftext|>', 'a' does not"
    assert any(told in f.text for f in report.of("warning"))


def test_padding_rows_are_told_and_needed_in_every_expert(look, made):
    padded, plain = made("padded", vocab_size=264), made("llama")
    assert found(look(plain, padded), "b: vocabulary") == (
        "exact", "7 of 264 embedding rows are padding, used by no token",
    )  # fmt: skip
    refused(PreflightError, look, "264", "257", "set tokenizer: b", a=padded, b=plain)
    look(padded, plain, method="union")


def test_tokenizer_larger_than_the_embedding_is_refused(look, made):
    small = made("small", vocab_size=200, eos_token_id=None)
    refused(PreflightError, look, "257 tokens", "200 rows", a=small, b=made("llama"))


# ---------------------------------------------------------------------------------------- architecture


def test_equal_shapes_with_other_heads_stay_apart(look, made):
    few = made("few", hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    many = made("many", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    shapes = [{n: Source(m).checkpoint.shape(n) for n in Source(m).checkpoint.names} for m in (few, many)]
    assert shapes[0] == shapes[1]
    report = look(few, many)
    level, text = found(report, "a: heads")
    assert level == "exact"
    assert text.startswith("4 heads of size 16")
    level, text = found(report, "b: heads")
    assert text.startswith("8 heads of size 8")
    assert "in heads of size 16" in text
    assert "none are averaged" in text
    assert found(report, "b: positions")[0] == "exact"  # every pair of 8 is one of 16
    specs = {k: Source(m).spec for k, m in (("a", few), ("b", many))}
    recipe = parse({"method": "fold", "anchor": "a", "size": "union",
                    "experts": {k: {"model": "m", "text": "t"} for k in specs}})  # fmt: skip
    target = plan.make(recipe, specs, {"a": 1, "b": 1}).shapes[0]
    assert (target.heads, target.head_size) == (12, 16)


@pytest.mark.parametrize("theta", [1e4, 2e4, 1e6])
def test_other_rotary_base_is_told_with_its_drift(look, made, theta):
    plain = made("llama")
    other = made(f"theta{theta:g}", rope_parameters={"rope_type": "default", "rope_theta": theta})
    level, text = found(look(plain, other), "b: positions")
    drift = placement(Source(other).spec, Source(plain).spec).worst_angle
    assert f"θ={theta:g} in pairs of θ=10000" in text
    if theta == 1e4:
        assert (level, drift) == ("exact", 0)
    else:
        assert level == "approximate"
        assert drift > architecture.EXACT_DRIFT
        assert f"{drift:.2g} radians in 64 tokens" in text


def test_scaled_rotary_frequencies_are_told(look, made):
    yarn = made("yarn", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                         "original_max_position_embeddings": 32})  # fmt: skip
    report = look(made("llama"), yarn)
    assert found(report, "b: positions")[0] == "approximate"


def test_biases_are_kept_or_go_through_the_constant(look, made):
    llama, qwen2 = made("llama"), made("qwen2", "qwen2")
    level, text = found(look(llama, qwen2), "b: biases")
    assert level == "approximate"
    assert "q, k, v go through a constant dimension" in text
    assert "a llama has none there" in text
    report = look(llama, qwen2, family="qwen2")
    assert found(report, "b: biases") == ("exact", "q, k, v keep theirs")
    assert "a: biases" not in subjects(report)
    assert found(report, "family")[0] == "warning"


def test_neox_and_gpt2_are_approximated_part_by_part(look, made):
    report = look(made("llama"), made("gpt_neox", "gpt_neox", rotary_pct=0.5))
    for part in ("positions", "norm", "parallel residual", "activation", "biases"):
        assert found(report, f"b: {part}")[0] == "approximate"
    assert "on 4 of 8 dimensions" in found(report, "b: positions")[1]
    assert "q, k, v, o, the MLP" in found(report, "b: biases")[1]
    assert not any(f.subject.startswith("a: ") for f in report.of("approximate"))
    report = look(made("llama"), made("gpt2", "gpt2"))
    assert found(report, "b: positions")[1].startswith("learned")
    assert found(report, "b: head")[0] == "exact"  # tied
    assert "b: parallel residual" not in subjects(report)


def test_a_source_only_family_as_the_anchor(look, made):
    level, text = found(look(made("gpt2", "gpt2"), made("llama")), "family")
    assert level == "warning"
    assert "the result is a llama; the anchor's family is gpt2" in text


def test_query_and_key_norms_both_ways(look, made):
    llama, qwen3 = made("llama"), made("qwen3", "qwen3")
    assert "a llama has none" in found(look(llama, qwen3), "b: q/k norms")[1]
    report = look(qwen3, llama)
    assert found(report, "b: q/k norms")[0] == "approximate"
    assert "one per layer" in found(report, "b: q/k norms")[1]


def test_window_and_context_are_told(look, made):
    report = look(made("llama"), made("window", "mistral", sliding_window=16, max_position_embeddings=256))
    level, text = found(report, "b: window")
    assert level == "approximate"
    assert "last 16 tokens" in text
    level, text = found(report, "b: context")
    assert (level, text) == ("warning", "it knows 256 positions; the result states the anchor's 128")


def test_what_differs_from_layer_to_layer_is_told(look, made):
    report = look(made("llama"), made("gemma", "gemma3_text", head_dim=8, num_hidden_layers=4))
    assert "last 8 tokens in 2 of 4 layers" in found(report, "b: window")[1]
    assert "θ=1e+06 (in 2 of 4 layers other frequencies, or none)" in found(report, "b: positions")[1]
    assert "normalised once more" in found(report, "b: norm")[1]
    report = look(made("llama"), made("olmo", "olmo2"))
    assert [f.text[:26] for f in report.findings if f.subject == "b: norm"] == [
        "what attention and MLP wri", "attention and MLP read the",
    ]  # fmt: skip
    assert "a llama has none" in found(report, "b: q/k norms")[1]
    assert found(look(made("llama"), made("smol", "smollm3")), "b: positions")[0] == "approximate"


def test_width_is_exact_only_where_all_fits(look, made):
    llama, neox = made("llama"), made("gpt_neox", "gpt_neox", rotary_pct=0.5)
    assert found(look(llama, llama), "width") == ("exact", "the experts' 64 dimensions in 64")
    level, text = found(look(llama, neox), "width")
    assert level == "exact"
    assert text.endswith("one of them constant")
    assert found(look(llama, neox, size={"width": 64, "heads": 8}), "width")[0] == "approximate"
    report = look(llama, neox, size={"params": "1x"})
    assert found(report, "width")[0] == "approximate"
    assert found(report, "pruning")[0] == "approximate"


def test_grouped_heads_and_depth(look, made):
    report = look(made("llama"), made("deep", num_hidden_layers=3, num_key_value_heads=1))
    assert "4 heads of size 8 (1 KV)" in found(report, "b: heads")[1]
    assert "repeated to serve 2 and not 4" in found(report, "b: heads")[1]
    level, text = found(report, "a: depth")
    assert (level, text) == ("exact", "2 layers, in order, in 3; it is the identity in the other 1")
    assert found(report, "b: depth") == ("exact", "3 layers, in order, in 3")


def test_a_deeper_expert_has_neighbours_in_one_layer(look, made):
    report = look(made("llama"), made("deep", num_hidden_layers=3), size={"params": "2x", "layers": 2})
    level, text = found(report, "b: depth")
    assert level == "approximate"
    assert text.startswith("3 layers in 2, up to 2 in one")
    assert found(report, "a: depth") == ("exact", "2 layers, in order, in 2")


@pytest.mark.parametrize(
    ("name", "error"),
    [("silu", 0), ("swish", 0), ("quick_gelu", 0), ("gelu", 0.0203), ("gelu_new", 0.0207), ("relu", 0.0349)],
)
def test_error_of_activations(name, error):
    assert architecture.activation_error(name) == pytest.approx(error, abs=3e-4)


def test_an_activation_without_a_stand_in_is_refused(look, made):
    refused(PreflightError, look, "b: activation 'relu2'", "method: union",
            a=made("llama"), b=made("relu2", "gpt_neox", hidden_act="relu2"))  # fmt: skip
    look(made("llama"), made("relu2"), method="union")


def test_odd_heads_are_refused(look, made):
    refused(PreflightError, look, "b: head size is 7", "even",
            a=made("llama"), b=made("odd", "gpt2", hidden_size=28))  # fmt: skip


def test_a_union_has_no_architecture_to_explain(look, made):
    report = look(made("llama"), made("gpt2", "gpt2"), method="union")
    assert {f.subject for f in report.findings} == {"tokenizer", "a: union", "b: union", "licence"}
    assert report.parameters == sum(Source(made(n)).parameters for n in ("llama", "gpt2"))


@pytest.mark.parametrize(
    ("method", "told"), [("union", {"size", "family", "heal"}), ("linear", {"size"}), ("fold", set())]
)
def test_keys_that_a_method_does_not_read_are_told(look, made, method, told):
    keys = {"size": {"params": "1.5x"}, "family": "mistral", "heal": {"tokens": 10_000, "length": 32}}
    report = look(made("llama"), made("second", seed=1), method=method, **keys)
    assert {f.subject for f in report.findings if "no effect" in f.text} == told


def test_what_a_method_refuses_is_refused_before_the_merge(look, made):
    llama, gpt2 = made("llama"), made("gpt2", "gpt2")
    refused(PreflightError, look, "gpt2 is not llama-like", a=llama, b=gpt2, method="linear")
    look(llama, gpt2, method="transport_and_merge")
    refused(PreflightError, look, "options.bases: 0 for 2 experts", a=llama, b=llama, method="task_vector_transport")
    refused(PreflightError, look, "not the base of", a=llama, b=llama, method="task_vector_transport",
            options={"bases": [str(llama), str(gpt2)]})  # fmt: skip
    refused(RecipeError, look, "skip_below", a=llama, b=llama, method="union", union={"skip_below": 0.9})


def test_space_for_the_work_is_needed_too(look, made, monkeypatch, tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def usage(path):
        return shutil._ntuple_diskusage(0, 0, 10**9 if Path(path) in (tmp_path, *tmp_path.parents) else 10**4)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(elsewhere))
    refused(OutputError, look, f"{elsewhere}: needs", a=made("llama"), b=made("llama"))


# ------------------------------------------------------------------------------- texts, files, the output


def test_rows_longer_than_a_context_are_refused(look, made):
    short = made("short", "gpt2", max_position_embeddings=24)
    refused(PreflightError, look, "fold.length: 32", "'b' knows only 24", "set fold.length: 24",
            a=made("llama"), b=short)  # fmt: skip
    refused(PreflightError, look, "heal.length: 64", "set heal.length: 48", a=made("llama"),
            b=made("mid", max_position_embeddings=48), heal={"tokens": 10_000, "length": 64})  # fmt: skip
    refused(PreflightError, look, "heal.length: 64", a=made("llama"), b=made("mid", max_position_embeddings=48),
            method="linear", heal={"tokens": 10_000, "length": 64})  # fmt: skip


def test_rows_longer_than_the_rotation_that_is_read_are_refused(look, made):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = made("phi", "phi3", rope_parameters=rope, original_max_position_embeddings=24, max_position_embeddings=128)
    refused(PreflightError, look, "fold.length: 32", "'b' knows only 24", a=made("llama"), b=phi)


def test_every_part_of_a_text_must_give_a_row(look, made, tmp_path):
    (tmp_path / "little.txt").write_text("".join(f"line {i} of a little text\n" for i in range(60)))
    model = made("long", max_position_embeddings=512)
    refused(TextError, look, "text of 'b'", "part: the text gives", "one row needs 300", "add text",
            a=model, b=model, changes={"b": str(tmp_path / "little.txt")}, fold={"length": 300})  # fmt: skip


def test_less_text_than_asked_for_is_a_warning(look, made):
    level, text = found(look(made("llama"), made("llama"), fold={"length": 32, "tokens": "1M"}), "b: text")
    assert level == "warning"
    assert "fold.tokens asks for 1,000,000" in text
    few = {"length": 32, "tokens": 64}
    _, text = found(look(made("llama"), made("llama"), fold=few, heal={"tokens": "200k", "length": 32}), "b: text")
    assert "healing asks for 100,000" in text


def test_too_few_rows_are_a_warning(look, made):
    model = made("llama")
    level, text = found(look(model, model, fold={"length": 32, "tokens": 1}), "fold.tokens")
    assert level == "warning"
    assert text.startswith("1 rows of 32 tokens")
    for fold, method in (({"tokens": 256}, "fold"), ({"tokens": 1}, "union")):
        assert "fold.tokens" not in subjects(look(model, model, fold={"length": 32, **fold}, method=method))


def test_a_shape_without_a_budget_is_told_where_it_is_large(look, made):
    one, other = made("llama"), made("second", seed=1)
    level, text = found(look(one, other, size={"layers": 2}), "size")
    assert level == "warning"
    assert "times the parameters of the largest expert; size.params: 1.5x bounds them" in text
    for size in ("union", {"layers": 2, "params": "1.5x"}, {"width": 32, "heads": 4, "mlp": 48}):
        assert "size" not in subjects(look(one, other, size=size))


def test_experts_that_are_one_model_or_have_one_text_are_a_warning(look, made, texts, tmp_path):
    one, other = made("llama"), made("second", seed=1)
    told = {"b: model", "b: text"}
    (tmp_path / "copy.txt").write_bytes((texts / "a.txt").read_bytes())
    for model, file, expected in (
        (other, "b.txt", set()),
        (one, "b.txt", {"b: model"}),
        (other, "a.txt", {"b: text"}),
        (other, tmp_path / "copy.txt", {"b: text"}),
    ):
        report = look(one, model, changes={"b": str(texts / file)})
        assert {f.subject for f in report.of("warning")} & told == expected


def test_what_a_lean_fold_leaves_out_is_told(look, made):
    few = {"length": 32, "tokens": 64, "refine": 0, "trials": False}
    level, text = found(look(made("llama"), made("llama"), fold=few, heal={"tokens": "10k", "length": 32}), "fold")
    assert level == "approximate"
    assert "64 tokens of each expert" in text
    assert "10,000 tokens of healing" in text
    assert not [f for f in look(made("llama"), made("llama"), fold=few).findings if f.subject == "fold"]


def test_a_leak_between_skills_is_a_warning(look, made, texts, tmp_path):
    skill = read_skill("a", [texts / "a.txt"])
    copied = [json.dumps({"text": document}) for document in skill.test + skill.validation]
    (tmp_path / "copied.jsonl").write_text("\n".join(copied))
    report = look(made("llama"), made("llama"), changes={"b": str(tmp_path / "copied.jsonl")})
    leaks = [f.text for f in report.of("warning") if f.subject == "a: text" and "look too good" in f.text]
    assert len(leaks) == 1
    assert f"of its {len(skill.test)} test documents are calibration or validation text of 'b'" in leaks[0]
    assert not any("look too good" in f.text for f in look(made("llama"), made("llama")).findings)


def test_licences(look, tmp_path):
    stated = "---\nlicense: mit\n---\n"
    cards = {"a": f"{stated}# A", "b": stated, "c": "no front matter", "d": "---\n: [\n---\n"}
    folders = {k: save_tiny_model(tmp_path / k) for k in cards}
    for name, card in cards.items():
        (folders[name] / "README.md").write_text(card)
    assert found(look(folders["a"], folders["b"]), "licence") == ("exact", "mit, as all experts state")
    for other in ("c", "d"):
        level, text = found(look(folders["a"], folders[other]), "licence")
        assert level == "warning"
        assert text.startswith("a mit, b states none")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(look, made, tmp_path, value):
    bad = save_tiny_model(tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = value
    save_file(weights, bad / "model.safetensors")
    refused(CheckpointError, look, name, str(bad), a=made("llama"), b=bad)


def test_output_is_looked_at_first(look, made, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("x")
    refused(OutputError, look, str(taken), "not empty", a=made("llama"), b=made("llama"), out=taken)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: usage)
    refused(OutputError, look, "1.0 kB free", a=made("llama"), b=made("llama"))


def test_nothing_is_written_and_nothing_touched(look, made, tmp_path):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(made("llama").iterdir())}
    look(made("llama"), made("gpt2", "gpt2"))
    assert list(tmp_path.iterdir()) == []
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(made("llama").iterdir())}


# ------------------------------------------------------------------------------------------- the report


def test_report_is_plain_data_and_readable(look, made):
    report = look(made("llama"), made("gpt2", "gpt2"), size={"params": "1.5x"}, dtype="bfloat16")
    largest = max(Source(made(n)).parameters for n in ("llama", "gpt2"))
    assert report.parameters <= 1.5 * largest
    summary = json.loads(json.dumps(report.summary()))
    assert set(summary) == {
        "findings",
        "parameters",
        "memory_bytes",
        "disk_bytes",
        "seconds",
        "stages",
        "lean_seconds",
        "sources",
    }
    assert report.disk_bytes > 2 * report.parameters
    text = str(report)
    for finding in report.findings:
        assert finding.text in text
    assert "llama" in report.sources["a"]
    assert text.index("look at this first") < text.index("approximated") < text.index("exact counterpart")
    assert found(report, "a: dtype") == ("approximate", "float32 in the expert, bfloat16 in the result")


def test_cost_grows_with_what_is_asked(look, made):
    small = look(made("llama"), made("gpt2", "gpt2"))
    asked = {"heal": {"tokens": "1M", "length": 32}, "fold": {"length": 32, "tokens": "1M"}}
    more = look(made("llama"), made("gpt2", "gpt2"), **asked)
    assert more.seconds > 3 * small.seconds
    assert more.memory_bytes > small.memory_bytes
    assert more.disk_bytes == small.disk_bytes


def test_trials_cost_time_and_can_be_left_out(look, made, monkeypatch):
    monkeypatch.setattr("polymerge.preflight.cost.speed", lambda *_: 1e9)
    few = {"length": 32, "refine": 0, "tokens": "1k"}
    tried, lean = (look(made("llama"), made("gpt2", "gpt2"), fold=few | {"trials": on}) for on in (True, False))
    assert lean.seconds < tried.seconds


def test_time_is_told_by_stage_and_measuring_goes_by_the_text_that_there_is(look, made, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("polymerge.preflight.cost.speed", lambda *_: 1e6)
    experts = (made("llama"), made("gpt2", "gpt2"))
    doubled = {}
    for name in ("a", "b"):
        text = (texts / f"{name}.txt").read_text()
        (tmp_path / f"{name}.txt").write_text(text + text.replace("number", "figure"))
        doubled[name] = str(tmp_path / f"{name}.txt")
    short, long = look(*experts), look(*experts, changes=doubled)
    assert set(short.stages) == {"basis", "choose", "fold", "refine", "evaluate"}
    assert short.seconds == sum(short.stages.values())
    assert re.search(r"time +about .* on this machine: .*refine \d", short.text())
    assert long.stages["evaluate"] == pytest.approx(2 * short.stages["evaluate"], rel=0.2)


def test_a_long_fold_is_told_with_what_a_lean_one_takes(look, made, monkeypatch):
    experts = (made("llama"), made("gpt2", "gpt2"))
    monkeypatch.setattr("polymerge.preflight.cost.speed", lambda *_: 1e6)
    asked = {"length": 32, "tokens": "64k"}
    whole, lean = look(*experts, fold=asked), look(*experts, fold=LEAN | {"length": 32})
    assert whole.lean_seconds == pytest.approx(lean.seconds)
    assert lean.lean_seconds == pytest.approx(lean.seconds)
    assert whole.seconds > 3600
    assert "with `fold: lean`" in whole.text()
    assert "with `fold: lean`" not in lean.text()
    monkeypatch.setattr("polymerge.preflight.cost.speed", lambda *_: 1e12)
    assert "with `fold: lean`" not in look(*experts, fold=asked).text()


def test_time_is_estimated_with_the_threads_that_the_merge_takes(look, made, monkeypatch):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    monkeypatch.setattr("polymerge.preflight.cost.speed", lambda *_: seen.append(torch.get_num_threads()) or 1e9)
    try:
        look(made("llama"), made("gpt2", "gpt2"))
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


ONCE = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from transformers import AutoTokenizer
from polymerge import plan, preflight
from polymerge.calibrate.texts import read_skill
from polymerge.model.source import Source
from polymerge.recipe import parse

torch.set_num_threads(1)
names, folder = sys.argv[1:4], Path(sys.argv[4])
recipe = parse({"method": "fold", "anchor": "a", "fold": {"length": 32}, "experts": {
    k: {"model": m, "text": str(folder / f"{t}.txt")} for k, m, t in zip("abc", names, "aba")}})
sources = {k: Source(e.model) for k, e in recipe.experts.items()}
tokenizers = {k: AutoTokenizer.from_pretrained(s.path) for k, s in sources.items()}
specs, sizes = ({k: getattr(s, n) for k, s in sources.items()} for n in ("spec", "parameters"))
shapes = plan.make(recipe, specs, sizes)
texts = {k: read_skill(k, e.text) for k, e in recipe.experts.items()}
report = preflight.check(recipe, sources, tokenizers, shapes, None, texts)
print(replace(report, stages={}, lean_seconds=None), shapes.shapes)
"""


def test_report_does_not_depend_on_the_hash_seed(made, texts):
    paths = [made("llama"), made("theta1e+06", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
             made("gpt_neox", "gpt_neox", rotary_pct=0.5)]  # fmt: skip
    source = str(Path(preflight.__file__).parents[2])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", ONCE, *map(str, paths), str(texts)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": source},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seed in ("0", "1")
    ]  # fmt: skip
    one, other = (run.communicate(timeout=120) for run in runs)
    assert [run.returncode for run in runs] == [0, 0], (one[1], other[1])
    assert one[0] == other[0]
    assert "c: parallel residual" in one[0]
