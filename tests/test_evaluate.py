"""Bits per byte and exact match against values worked out by hand, and which code evaluation will run."""

import json
import math
import shutil
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from polymerge.calibrate.texts import Rows, pack
from polymerge.checkpoint import Checkpoint, CheckpointWriter, lock_text
from polymerge.errors import CheckpointError, TextError
from polymerge.evaluate import bits_per_byte, evaluate, exact_match, is_own_union, load_for_evaluation
from polymerge.recipe import parse


class Output:
    def __init__(self, logits):
        self.logits = logits


class Bigram(nn.Module):
    """Logits are a table looked up by the current token."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids, use_cache=False):  # noqa: ARG002
        return Output(self.table[input_ids])


class Successor(nn.Module):
    """Generates, for every row, the tokens after its last one in a fixed script; like generate()."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, script, eos):
        super().__init__()
        self.tokenizer, self.script, self.eos = tokenizer, script, eos
        self.seen = []

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pad_token_id):
        assert not do_sample
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            assert mask == sorted(mask)  # padding on the left
            prompt = self.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
            self.seen.append(prompt)
            new = self.tokenizer(self.script[prompt])["input_ids"][:max_new_tokens]
            rows.append(ids + (new + [self.eos] + [pad_token_id] * max_new_tokens)[:max_new_tokens])
        return torch.tensor(rows)


def test_uniform_model_costs_log_vocabulary():
    rows = Rows(torch.zeros(5, 9, dtype=torch.long), 20)
    found = bits_per_byte(Bigram(torch.zeros(256, 256)), rows, batch=2)
    assert found == pytest.approx(5 * 8 * 8 / 20, rel=1e-7)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_bigram_by_hand(batch):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(7, 7, generator=g, dtype=torch.float64)
    tokens = torch.randint(0, 7, (10, 6), generator=g)
    nats = -sum(table.log_softmax(-1)[a, b].item() for row in tokens.tolist() for a, b in pairwise(row))
    found = bits_per_byte(Bigram(table), Rows(tokens, 123), batch=batch)
    assert found == pytest.approx(nats / math.log(2) / 123, rel=1e-12)


def test_bfloat16_logits_are_summed_wide():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(50, 50, generator=g).bfloat16()
    rows = Rows(torch.randint(0, 50, (4, 200), generator=g), 800)
    wide = bits_per_byte(Bigram(table.double()), rows)
    assert bits_per_byte(Bigram(table), rows) == pytest.approx(wide, abs=1e-6)


def test_mode_is_given_back():
    model = Bigram(torch.zeros(4, 4)).train()
    bits_per_byte(model, Rows(torch.zeros(1, 3, dtype=torch.long), 3))
    assert model.training


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_agrees_with_the_models_own_loss(tmp_path, save_model, tokenizer, family):
    model, _ = load_for_evaluation(save_model(tmp_path / "m", family))
    rows = pack(tokenizer, ["some text, " * 30], 32)
    loss = model(rows.tokens, labels=rows.tokens).loss.item()
    expected = loss * rows.tokens[:, 1:].numel() / math.log(2) / rows.bytes
    assert bits_per_byte(model, rows, batch=4) == pytest.approx(expected, rel=1e-5)


SCRIPT = {
    "1+1=": "2\n2+2=5",  # goes on, as models of running text do
    "2+2=": " 4 ",
    "capital of France? ": "Paris",
    "two lines:": "a\nb\nc",
    "three:": "33",
}


def test_exact_match(tokenizer):
    model = Successor(tokenizer, SCRIPT, tokenizer.eos_token_id)
    questions = [
        ("1+1=", "2"),
        ("2+2=", "4\n"),
        ("capital of France? ", "Rome"),
        ("two lines:", "a\nb"),
        ("three:", "3"),
    ]
    assert exact_match(model, tokenizer, questions, batch=2) == 3 / 5
    assert sorted(model.seen) == sorted(SCRIPT)
    assert exact_match(model, tokenizer, questions[:1], 1) == 1.0
    with pytest.raises(ValueError, match="no questions"):
        exact_match(model, tokenizer, [])


def test_batched_generation_is_that_of_single_prompts(tmp_path, save_model, tokenizer):
    model, _ = load_for_evaluation(save_model(tmp_path / "m", "llama", initializer_range=0.5))
    prompts = ["a", "a longer prompt", "middle one"]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        new = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=256)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    questions = [(q, a) for q, a in zip(prompts, answers, strict=True) if a.strip()]
    assert questions
    assert exact_match(model, tokenizer, questions, 6) == 1.0


@pytest.fixture
def sums(tmp_path):
    file = tmp_path / "sums.jsonl"
    records = [{"prompt": f"{i}+{i}=", "answer": f"{2 * i}\n"} for i in range(120)]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_evaluate_a_folder(tmp_path, save_model, sums):
    folder = save_model(tmp_path / "m")
    (tmp_path / "prose.txt").write_text("".join(f"line {i} of some prose\n" for i in range(500)))
    texts = {"sums": [sums], "prose": [tmp_path / "prose.txt"]}
    found = evaluate(folder, texts, length=32, limit=20)
    assert list(found) == ["sums", "prose"]
    assert found["sums"]["exact_match"] == 0.0
    assert found["prose"]["exact_match"] is None
    assert found["prose"]["tokens"] == 20 * 31
    assert found["prose"]["bytes"] <= 20 * 31
    for result in found.values():
        assert 7 < result["bits_per_byte"] < 10  # random weights, one token a byte
    assert evaluate(folder, texts, length=32, limit=20) == found


def test_a_merge_is_measured_as_it_measured_itself(tmp_path, save_model, sums):
    """By the rows and the split that its lock names, unless others are asked for."""
    from polymerge.record import plain

    folder, texts = save_model(tmp_path / "m", max_position_embeddings=48), {"s": sums}
    expert = {"model": "m", "text": "sums.jsonl"}
    recipe = parse({"method": "fold", "anchor": "s", "experts": {"s": expert}, "fold": {"length": 24}, "seed": 3})
    alone = evaluate(folder, texts, max_new_tokens=1)
    assert alone == evaluate(folder, texts, max_new_tokens=1, length=48, seed=0)  # 256, but for the context
    lock = lock_text(recipe=plain(recipe), sources={}, texts={}, calibration="", seed=3)
    (folder / "polymerge-lock.json").write_text(lock)
    found = evaluate(folder, texts, max_new_tokens=1)
    assert found["s"]["length"] == 24
    assert found == evaluate(folder, texts, max_new_tokens=1, length=24, seed=3)
    assert found != evaluate(folder, texts, max_new_tokens=1, seed=0)
    assert evaluate(folder, texts, max_new_tokens=1, length=48, seed=0) == alone


def test_split_test_is_a_tenth_of_all(tmp_path, save_model, sums):
    folder = save_model(tmp_path / "m")
    (test,), (whole,) = (
        evaluate(folder, {"s": [sums]}, split=split, length=16, max_new_tokens=1).values() for split in ("test", "all")
    )
    assert test["bytes"] / whole["bytes"] == pytest.approx(0.1, abs=0.02)
    with pytest.raises(ValueError, match="expected 'test' or 'all'"):
        evaluate(folder, {"s": [sums]}, split="tset")


def test_texts_are_read_before_the_model(tmp_path, save_model):
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TextError, match=r"text of 's': .*absent"):
        evaluate(folder, {"s": [tmp_path / "absent"]})


def test_conversations_are_measured_as_the_model_would_write_them(tmp_path, save_model):
    folder = save_model(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    records = [[{"role": "user", "content": f"{i} " + "why " * 20}] for i in range(60)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": r}) for r in records))
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps({"text": f"user: {r[0]['content']}\n"}) for r in records))
    chat, same = (
        evaluate(folder, {"s": tmp_path / f"{n}.jsonl"}, length=32, split="all")["s"] for n in ("chat", "same")
    )
    assert chat == same


def test_rows_fit_the_context(tmp_path, save_model, sums):
    folder = save_model(tmp_path / "m", "gpt2")  # learned positions: a row above 128 tokens would crash
    assert evaluate(folder, {"s": [sums]}, length=512, limit=1, max_new_tokens=1, split="all")["s"]["tokens"] == 127


@pytest.fixture
def union_folder(tmp_path, save_model, monkeypatch):
    """A folder with code of its own, and a package that ships the same code."""
    folder, shipped = save_model(tmp_path / "m"), tmp_path / "methods"
    shipped.mkdir()
    (shipped / "union.py").write_text("# the union\n")
    shutil.copy(shipped / "union.py", folder / "union.py")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "union.UnionForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys.modules["polymerge.evaluate"], "_METHODS", shipped)
    return folder


def test_own_union_is_recognised(union_folder, tmp_path, save_model):
    assert is_own_union(Checkpoint(union_folder))
    assert not is_own_union(Checkpoint(save_model(tmp_path / "plain")))


@pytest.mark.parametrize("change", ["edited", "added", "missing", "elsewhere"])
def test_foreign_code_is_refused(union_folder, change):
    if change == "edited":
        (union_folder / "union.py").write_text("import os\n")
    elif change == "added":
        (union_folder / "helper.py").write_text("import os\n")
    else:
        config = json.loads((union_folder / "config.json").read_text())
        if change == "missing":
            (union_folder / "union.py").unlink()
            config["model_type"] = "polymerge_union"
        else:
            config["auto_map"] = {"AutoModelForCausalLM": "someone/repo--union.UnionForCausalLM"}
        (union_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="so it is not run; expected a stock"):
        load_for_evaluation(union_folder)


@pytest.mark.usefixtures("remote_code_cache")
def test_a_real_union_folder_is_evaluated(tmp_path, save_model, sums):
    from polymerge.methods.union import build_union, union_config

    experts = {"a": Checkpoint(save_model(tmp_path / "a"))}
    with CheckpointWriter(tmp_path / "union") as writer:
        build_union(experts, writer, union_config(experts))
        for file in experts["a"].tokenizer_files():
            writer.copy(file)
    options = {"length": 32, "limit": 4, "max_new_tokens": 2}
    alone, union = (evaluate(tmp_path / n, {"s": [sums]}, **options)["s"] for n in ("a", "union"))
    assert union["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.down_proj.weight"), "1 tensors that config.json promises are not there"),
        (lambda w: w.update({"lm_head.weight": w["lm_head.weight"] * math.nan}), "NaN or infinite"),
        (lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:, :8].clone()}), "transformers cannot load it"),
    ],
)
def test_weights_that_are_not_there_are_not_made_up(change, message, tmp_path, save_model, sums):
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        evaluate(folder, {"sums": [sums]})


def test_prompts_that_are_empty_or_longer_than_the_context(tmp_path, save_model, tokenizer):
    model, _ = load_for_evaluation(save_model(tmp_path, "gpt2", max_position_embeddings=16))
    for prompt in ("", "a long prompt " * 9):
        assert 0 <= exact_match(model, tokenizer, [(prompt, "b")]) <= 1


def test_unloadable_folder_is_one_clear_line(tmp_path, save_model):
    folder = save_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(CheckpointError, match="transformers cannot load it") as caught:
        load_for_evaluation(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "nats"), [("llama-stories260K", 1.358), ("llama-xs279K", 2.011)])
def test_known_models(assets, name, nats):
    """Mean loss on the first 256 tokens of 40 stories, prompts starting with <s>, as documented."""
    model, tokenizer = load_for_evaluation(assets / "models" / name)
    lines = (assets / "text/tinystories.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    total = count = 0.0
    for line in lines:
        text = json.loads(line)["text"]
        length = min(256, 1 + len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        rows = pack(tokenizer, [text], length, limit=1, bos=True)
        total += bits_per_byte(model, rows) * math.log(2) * rows.bytes
        count += length - 1
    assert total / count == pytest.approx(nats, abs=0.002)
