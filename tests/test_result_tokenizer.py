"""The tokenizer that a result speaks: the anchor's, another expert's, or one with all vocabularies."""

import json
import shutil
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_tokenizer, save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import polymerge
from polymerge.align.token_bytes import byte_view
from polymerge.align.union_vocab import cut, merges_of, union_tokenizer
from polymerge.errors import PreflightError, RecipeError
from polymerge.recipe import parse

PROSE = "the other cat thought that there were 12 others, then sat. Déjà vu: 1999 🦊\n" * 6
CODE = "def f(x):\n    return self.other(x) * 2024\n\n        if there: print('thermal')\n" * 6
TEXTS = [
    "plain prose, then some more", "def f(x):\n    return x\n\n\tif x:\n        pass\n", "1234567890 3.14e-8 0x1F",
    "🦊👩‍👩‍👧🎉",
    "中文 и кириллица العربية", "  \t \n\n   ", "naïve café \u0301", "<|endoftext|>", "", "a\u0000b\r\n",
]  # fmt: skip


def trained(text: str, size: int, *special: str, split: Any = None, normalizer: Any = None, **keys: Any) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **keys)


MINE = trained(PROSE, 330, "<|endoftext|>", eos_token="<|endoftext|>")
THEIRS = trained(CODE, 360, "</s>", "<|user|>", eos_token="</s>", additional_special_tokens=["<|user|>"])
BOTH = union_tokenizer("mine", MINE, {"theirs": THEIRS})


def model_of(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def test_the_anchors_ids_and_ranks_stay():
    one, both = model_of(MINE), model_of(BOTH)
    assert all(both["vocab"][token] == i for token, i in one["vocab"].items())
    assert merges_of(both)[: len(one["merges"])] == merges_of(one)
    assert BOTH.eos_token_id == MINE.eos_token_id
    assert sorted(both["vocab"].values()) == list(range(len(BOTH)))


def test_every_token_of_both_is_one_piece():
    """Alone; and every merge is of tokens that exist."""
    both = BOTH.backend_tokenizer.model
    view = byte_view(BOTH)
    assert len(BOTH) > len(MINE)
    for tokenizer in (MINE, THEIRS):
        for piece, special in zip(byte_view(tokenizer).pieces, byte_view(tokenizer).special, strict=True):
            if not special:
                assert [t.value for t in both.tokenize(piece)] == [piece]
    known = set(view.pieces)
    for pair in merges_of(model_of(BOTH)):
        assert {*pair, "".join(pair)} <= known


def test_special_tokens_go_by_role_then_by_literal():
    view = byte_view(BOTH)
    assert "</s>" not in view.pieces  # the end is the anchor's
    assert view.special[view.pieces.index("<|user|>")]
    assert BOTH("a<|user|>b")["input_ids"][1] == view.pieces.index("<|user|>")


def test_our_cut_is_that_of_the_library():
    ranks = {pair: i for i, pair in enumerate(merges_of(model_of(BOTH)))}
    written = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for word, _ in written.pre_tokenize_str(PROSE[:80] + CODE[:90]):
        assert cut(word, ranks) == [t.value for t in BOTH.backend_tokenizer.model.tokenize(word)]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trips(text):
    assert BOTH.decode(BOTH(text)["input_ids"]) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\tthert2024_🦊中"))))
def test_round_trips_of_any_text(text):
    assert BOTH.decode(BOTH(text)["input_ids"]) == text


def test_texts_become_no_longer_than_in_the_anchors_tokens():
    for text in (PROSE, CODE):
        assert len(BOTH(text)["input_ids"]) <= len(MINE(text)["input_ids"])
    assert len(BOTH(CODE)["input_ids"]) < 0.8 * len(MINE(CODE)["input_ids"])


def test_a_union_of_one_tokenizer_is_that_tokenizer():
    assert union_tokenizer("a", MINE, {"b": trained(PROSE, 330, "<|endoftext|>", eos_token="<|endoftext|>")}) is MINE
    assert union_tokenizer("a", MINE, {}) is MINE


def test_added_tokens_behind_the_vocabulary_keep_their_ids():
    """As Llama 3 has them: beside the model's vocabulary, with the ids after it."""
    behind = byte_tokenizer()
    behind.add_tokens(["<|x|>"], special_tokens=True)
    both = union_tokenizer("a", behind, {"b": THEIRS})
    assert both.convert_tokens_to_ids("<|x|>") == behind.convert_tokens_to_ids("<|x|>")
    assert both.eos_token_id == behind.eos_token_id
    assert both.decode(both("a<|x|>b")["input_ids"]) == "a<|x|>b"


def unigram() -> Any:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(("other", "needle"), [
    (trained(CODE, 300, split=pre_tokenizers.ByteLevel(add_prefix_space=True)), "the pre_tokenizer of 'a' and of 'b'"),
    (trained(CODE, 300, normalizer=normalizers.NFC()), "the normalizer of 'a' and of 'b'"),
    (unigram(), "'b' has metaspace Unigram"),
])  # fmt: skip
def test_what_cannot_be_joined_is_refused_in_one_line(other, needle):
    with pytest.raises(PreflightError, match="set `tokenizer:` to the name of one expert") as caught:
        union_tokenizer("a", MINE, {"b": other})
    assert needle in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ merges


def two_models(folder):
    """Two tiny models, each with a tokenizer of its own, and their texts."""
    save_tiny_model(folder / "prose", vocab_size=len(MINE), num_hidden_layers=1, eos_token_id=0)
    save_tiny_model(
        folder / "code", "gpt_neox", hidden_size=24, num_attention_heads=2, num_hidden_layers=2, seed=1,
        vocab_size=len(THEIRS) + 3, bos_token_id=1, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    MINE.save_pretrained(folder / "prose")
    THEIRS.save_pretrained(folder / "code")
    for name, word in (("prose", "the other cat"), ("code", "    return self.f")):
        (folder / f"{name}.txt").write_text("".join(f"{word} {i * i}\n" for i in range(600)))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_models(tmp_path_factory.mktemp("speech"))


def recipe(folder, **changes):
    return {
        "method": "fold", "anchor": "prose", "size": {"params": "2x"}, "dtype": "float32",
        "experts": {k: {"model": str(folder / k), "text": str(folder / f"{k}.txt")} for k in ("prose", "code")},
        "fold": {"length": 16, "tokens": 640, "refine": 2, "trials": False},
        "heal": {"tokens": "512", "batch_rows": 8, "length": 16}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(("asked", "method"), [("code", "fold"), ("union", "fold"), ("code", "union")])
def test_a_merge_speaks_the_tokenizer_asked_for(folder, asked, method):
    changes = {"tokenizer": asked, "method": method} | ({"heal": None} if method == "union" else {})
    path = folder / f"{asked}-{method}.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **changes)))
    result = polymerge.merge(path, folder / f"out-{asked}-{method}")
    spoken = AutoTokenizer.from_pretrained(result.out)
    expected = THEIRS if asked == "code" else BOTH
    assert spoken.get_vocab() == expected.get_vocab()
    for text in (*TEXTS, PROSE, CODE):
        assert spoken(text)["input_ids"] == expected(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(result.out, trust_remote_code=method == "union")
    rows = len(THEIRS) + 3 if asked == "code" else len(BOTH)
    assert model.config.vocab_size == rows
    assert model.config.eos_token_id == model.generation_config.eos_token_id == spoken.eos_token_id
    assert model.config.bos_token_id == (1 if asked == "code" else None)
    assert model.config.pad_token_id == (1 if asked == "code" else None)
    logits = model(input_ids=torch.tensor([spoken(CODE[:40])["input_ids"]])).logits
    assert logits.shape[-1] == rows
    assert torch.isfinite(logits).all()
    for row in result.skills.values():
        assert 0 < row["owner"] < 20
        assert (row["union"] is None) if method == "union" else 0 < row["union"] < 20
    if method == "fold":
        assert (result.out / "config.json").read_text().count("auto_map") == 0
        assert result.shape["vocab"] == rows


def test_preflight_tells_of_both(folder, tmp_path):
    report = polymerge.merge(parse(recipe(folder, tokenizer="union")), tmp_path / "out", dry_run=True).report
    told = {f.subject: f.text for f in report.findings}
    assert told["tokenizer"].startswith(f"{len(BOTH)} tokens: the anchor's {len(MINE)}")
    assert "another tokenizer" in told["prose: tokenizer"]
    assert "another tokenizer" in told["code: tokenizer"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "needle"), [
    ({"tokenizer": "cod"}, "no tokenizer 'cod'; did you mean 'code'?"),
    ({"tokenizer": "union", "method": "union"}, "one of them must read the result's tokens"),
])  # fmt: skip
def test_recipes_that_ask_for_nothing_possible(folder, changes, needle):
    with pytest.raises(RecipeError) as caught:
        parse(recipe(folder, **changes))
    assert needle in str(caught.value)


def wordpiece() -> Any:
    words = [
        "[UNK]",
        "the",
        "cat",
        "other",
        "return",
        "self",
        "f",
        ".",
        *"0123456789",
        *(f"##{d}" for d in "0123456789"),
    ]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_wordpiece_may_read_and_not_be_spoken(folder, tmp_path):
    save_tiny_model(tmp_path / "words", vocab_size=len(wordpiece()), eos_token_id=None)
    wordpiece().save_pretrained(tmp_path / "words")
    asked = recipe(folder)
    asked["experts"]["code"]["model"] = str(tmp_path / "words")
    told = {f.subject: f.text for f in polymerge.merge(parse(asked), tmp_path / "o", dry_run=True).report.findings}
    assert "no spaces, line breaks or case" in told["code: tokenizer"]
    result = polymerge.merge(parse({**asked, "heal": None}), tmp_path / "out")
    assert all(0 < row["fold"] < 20 for row in result.skills.values())
    with pytest.raises(PreflightError, match=r"WordPiece tokenizer of 'code' loses spaces.*set tokenizer: prose"):
        polymerge.merge(parse({**asked, "tokenizer": "code"}), tmp_path / "not", dry_run=True)


def test_a_family_whose_tokenizer_cannot_be_loaded_as_it_is_is_refused(folder, tmp_path):
    """AutoTokenizer reads every qwen2 folder with Qwen2's rule; a qwen2 expert that has this already is told of it."""
    asked = recipe(folder, family="qwen2", tokenizer="union")
    with pytest.raises(PreflightError, match=r"a qwen2 by the rule of Qwen2Tokenizer.*set family: llama"):
        polymerge.merge(parse(asked), tmp_path / "out", dry_run=True)
    save_tiny_model(tmp_path / "qwen", "qwen2", vocab_size=len(MINE), eos_token_id=0)
    MINE.save_pretrained(tmp_path / "qwen")
    asked = recipe(folder)
    asked["experts"]["prose"]["model"] = str(tmp_path / "qwen")
    told = {f.subject: f.text for f in polymerge.merge(parse(asked), tmp_path / "out", dry_run=True).report.findings}
    assert "load it with PreTrainedTokenizerFast" in told["tokenizer: loading"]
    classed = shutil.copytree(folder / "prose", tmp_path / "classed")
    described = json.loads((classed / "tokenizer_config.json").read_text())
    (classed / "tokenizer_config.json").write_text(json.dumps({**described, "tokenizer_class": "Qwen2Tokenizer"}))
    asked["experts"]["prose"]["model"] = str(classed)
    told = {f.subject: f.text for f in polymerge.merge(parse(asked), tmp_path / "out", dry_run=True).report.findings}
    assert "load it with PreTrainedTokenizerFast" in told["tokenizer: loading"]


def test_a_union_cannot_teach_across_tokenizers(folder, tmp_path):
    asked = recipe(folder, heal={"tokens": "512", "batch_rows": 8, "length": 16, "teacher": "union"})
    with pytest.raises(PreflightError, match=r"'code' has another than the result; set heal\.teacher: owner"):
        polymerge.merge(parse(asked), tmp_path / "out", dry_run=True)
