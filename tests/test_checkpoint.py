"""Reading and writing checkpoints: round trips, laziness, determinism, the card and the lock."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from polymerge._suggest import unknown
from polymerge.checkpoint import Card, Checkpoint, CheckpointWriter, SkillRow, lock_text, model_card
from polymerge.errors import CheckpointError, OutputError

FAMILIES = ["llama", "gpt2", "gpt_neox"]


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 3, generator=g).bfloat16(),
        "b.weight": torch.randn(4, 4, generator=g),
        "c.scalar": torch.tensor(2.5, dtype=torch.float64),
        "d.mask": torch.tensor([True, False, True]),
        "e.ids": torch.arange(7, dtype=torch.int64),
        "f.empty": torch.zeros(0, 3),
        "g.half": torch.randn(3, generator=g).half(),
    }


def write(out, content, **options):
    with CheckpointWriter(out, **options) as writer:
        for name, tensor in content.items():
            writer.add(name, tensor)
        writer.text("config.json", '{"model_type": "llama"}\n')
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_wrote(tmp_path, save_model, family):
    folder = save_model(tmp_path / "m", family, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint:
        checkpoint.check()
        checkpoint.check_finite()
        assert checkpoint.names == tuple(sorted(stored))
        assert checkpoint.config["model_type"] == family
        assert checkpoint.nbytes == sum(t.nbytes for t in stored.values())
        assert checkpoint.parameters == sum(t.numel() for t in stored.values())
        for name, tensor in stored.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert checkpoint.dtype(name) == tensor.dtype
            assert torch.equal(checkpoint.tensor(name), tensor)
        name = next(n for n in checkpoint.names if len(checkpoint.shape(n)) == 2)
        assert torch.equal(checkpoint.slice(name)[1:3, :2], stored[name][1:3, :2])
    assert [p.name for p in checkpoint.tokenizer_files()] == ["tokenizer.json", "tokenizer_config.json"]
    assert checkpoint.generation_config_file() == folder / "generation_config.json"


def test_reads_shards_lazily(tmp_path, save_model):
    folder = save_model(tmp_path / "m", max_shard_size="40KB")
    whole = save_model(tmp_path / "w")
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    assert len(checkpoint.weight_files()) > 2
    stored = load_file(whole / "model.safetensors")
    first, *others = checkpoint.weight_files()
    inside = sorted(load_file(first))
    for other in others:
        other.unlink()  # headers are read by now; the first shard must not need the others
    assert torch.equal(checkpoint.tensor(inside[0]), stored[inside[0]])


def test_constructing_reads_nothing(tmp_path):
    Checkpoint(tmp_path / "absent")


def test_closing_reopens(tmp_path, save_model):
    checkpoint = Checkpoint(save_model(tmp_path / "m"))
    name = checkpoint.names[0]
    before = checkpoint.tensor(name)
    checkpoint.close()
    assert torch.equal(checkpoint.tensor(name), before)


def test_digest_follows_content(tmp_path, save_model):
    one, same, other = (save_model(tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert Checkpoint(one).digest() == Checkpoint(same).digest() != Checkpoint(other).digest()
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(Checkpoint(one).file_digests()) == expected
    (same / "tokenizer.json").write_text("{}")
    assert Checkpoint(one).digest() != Checkpoint(same).digest()


def test_unknown_tensor_suggests(tmp_path, save_model):
    checkpoint = Checkpoint(save_model(tmp_path / "m"))
    with pytest.raises(CheckpointError, match=r"nearest stored name: 'model\.norm\.weight'"):
        checkpoint.tensor("model.nrom.weight")


def test_suggestion_sentence():
    assert unknown("method", "tiees", ["ties", "dare"]) == ("no method 'tiees'; did you mean 'ties'? known: dare, ties")
    assert unknown("method", "zzz", ["ties"]) == "no method 'zzz'; known: ties"


@pytest.mark.parametrize(("shard_bytes", "files"), [(5_000_000_000, 1), (70, 4), (1, 7)])
def test_writes_and_reads_back(tmp_path, shard_bytes, files):
    content = tensors()
    checkpoint = Checkpoint(write(tmp_path / "out", content, shard_bytes=shard_bytes))
    checkpoint.check()
    assert len(checkpoint.weight_files()) == files
    for name, tensor in content.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.dtype(name) == tensor.dtype
    joined = {}
    for file in checkpoint.weight_files():
        joined.update(load_file(file))  # the reference reader agrees
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert sorted(joined) == sorted(content)
    if files > 1:
        assert checkpoint.weight_files()[0].name == f"model-00001-of-{files:05d}.safetensors"
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == checkpoint.nbytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_tensors_are_aligned(tmp_path):
    file = write(tmp_path / "out", tensors()) / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in tensors().items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_shard_keeps_to_its_size(tmp_path):
    content = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}  # 40 bytes each
    checkpoint = Checkpoint(write(tmp_path / "out", content, shard_bytes=100))
    assert [len(load_file(f)) for f in checkpoint.weight_files()] == [2, 2, 2, 1]


def test_transformers_loads_what_we_wrote(tmp_path, save_model):
    from transformers import AutoModelForCausalLM

    source = Checkpoint(save_model(tmp_path / "m", "qwen2", dtype=torch.bfloat16))
    with CheckpointWriter(tmp_path / "out", shard_bytes=20_000) as writer:
        for name in source.names:
            writer.add(name, source.tensor(name))
        writer.copy(source.path / "config.json")
        for file in source.tokenizer_files():
            writer.copy(file)
    ids = torch.arange(20)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (source.path, tmp_path / "out"))
    assert torch.equal(one, two)


def test_same_content_same_bytes(tmp_path):
    one, two = (write(tmp_path / n, tensors(), shard_bytes=70) for n in "ab")
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert all(p.read_bytes() == (two / p.name).read_bytes() for p in one.iterdir())


def test_strided_and_shared_tensors(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    out = write(tmp_path / "out", {"t": base.T, "row": base[1], "flip": base[:, 1:3]})
    checkpoint = Checkpoint(out)
    assert torch.equal(checkpoint.tensor("t"), base.T)
    assert torch.equal(checkpoint.tensor("row"), base[1])
    assert torch.equal(checkpoint.tensor("flip"), base[:, 1:3])
    assert checkpoint.nbytes == (12 + 4 + 6) * 4


def test_folder_mode_follows_umask(tmp_path):
    mask = os.umask(0o022)
    try:
        assert write(tmp_path / "out", tensors()).stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(mask)


def test_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", tensors())
    write(tmp_path / "a/b/out", tensors())
    assert (tmp_path / "a/b/out/model.safetensors").is_file()


def test_one_name_once(tmp_path):
    with pytest.raises(OutputError, match="'x' added twice"), CheckpointWriter(tmp_path / "o") as writer:  # noqa: PT012
        writer.add("x", torch.ones(1))
        writer.add("x", torch.ones(1))
    with pytest.raises(OutputError, match="not a new plain file name"), CheckpointWriter(tmp_path / "o") as w:
        w.text("../escape.txt", "x")
    assert list(tmp_path.iterdir()) == []


def card(**changes):
    settings = {
        "title": "prose-code",
        "base_models": ["prose-llama", "code-gpt2"],
        "method": "fold",
        "recipe": "method: fold\n# ``` a fence in a comment\n",
        "description": "Two experts folded into one.",
        "parameters": 1_234_567,
        "skills": [SkillRow("prose", 2.0, 2.01, 2.5, 2.1), SkillRow("code", 1.5, 1.51, None, 1.6)],
        "licenses": ["apache-2.0", "apache-2.0"],
        "bibtex": ["@misc{x, title={X}}"],
        **changes,
    }
    return model_card(Card(**settings))


def test_card():
    text = card()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["prose-llama", "code-gpt2"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "polymerge", "fold"],
    }
    assert "````yaml\nmethod: fold\n# ``` a fence in a comment\n````" in body
    assert "| prose | 2.000 | 2.010 | 2.500 | 2.100 |" in body
    assert "| code | 1.500 | 1.510 | – | 1.600 |" in body
    assert "1,234,567" in body
    assert "```bibtex\n@misc{x, title={X}}\n```" in body


@pytest.mark.parametrize("licenses", [["mit", "apache-2.0"], [None, None], [], ["mit", None]])
def test_card_states_no_license_that_experts_do_not_share(licenses):
    assert "license:" not in card(licenses=licenses)


def test_lock_is_deterministic_and_complete():
    def make(order):
        recipe = {k: {"method": "fold", "seed": 1}[k] for k in order}
        return lock_text(recipe=recipe, sources={"a": {"f": "1"}}, texts={}, calibration="c0ffee", seed=1)

    assert make(["method", "seed"]) == make(["seed", "method"])
    lock = json.loads(make(["seed", "method"]))
    assert lock["packages"]["torch"].startswith("2.")
    assert set(lock) == {"format", "recipe", "sources", "texts", "calibration", "seed", "packages"}


def test_single_file_wins_like_in_transformers(tmp_path, save_model):
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    Checkpoint(folder).check()


def test_save_file_agrees_on_a_plain_case(tmp_path):
    content = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    save_file(content, tmp_path / "ref.safetensors", metadata={"format": "pt"})
    out = write(Path(tmp_path / "out"), content)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "ref.safetensors").read_bytes()
