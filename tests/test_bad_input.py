"""Bad input to a whole merge: one line names the culprit, inputs are untouched, nothing is left behind."""

import errno
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import save_tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import polymerge
from polymerge.checkpoint import place, shard
from polymerge.errors import (
    CheckpointError,
    FamilyError,
    OutputError,
    PolymergeError,
    PreflightError,
    RecipeError,
    TextError,
)
from polymerge.evaluate import load_for_evaluation

KNOBS = {
    "ridge": 1e-3,
    "mute": 0.1,
    "mute_last": 0.3,
    "off_gate": 0.0,
    "off_weight": 0.3,
    "even": 0.0,
    "hosts": "ends",
}  # given: no trials
RECIPE = {
    "method": "fold",
    "anchor": "prose",
    "experts": {
        "prose": {"model": "prose", "text": "prose.txt"},
        "code": {"model": "code", "text": "code.txt"},
    },
    "size": "union",
    "fold": {"length": 16, "tokens": 320, "refine": 2} | KNOBS,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two tiny experts of different family and depth, with texts."""
    folder = tmp_path_factory.mktemp("originals")
    save_tiny_model(folder / "prose", hidden_size=16, intermediate_size=16, num_attention_heads=2,
                    num_key_value_heads=2)  # fmt: skip
    save_tiny_model(folder / "code", "gpt_neox", hidden_size=16, intermediate_size=16, num_attention_heads=2,
                    num_hidden_layers=1, seed=1, max_shard_size="10KB")  # fmt: skip
    for name, word in (("prose", "apple"), ("code", "brick")):
        (folder / f"{name}.txt").write_text("".join(f"{word} {i * i}\n" for i in range(400)))
    return folder


@pytest.fixture
def here(originals, tmp_path, monkeypatch):
    """A folder with copies of the experts and texts; temporary files go beside it."""
    folder, scratch = tmp_path / "here", tmp_path / "scratch"
    shutil.copytree(originals, folder)
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return folder


def snapshot(folder):
    """All that is in a folder, hidden files and empty folders too."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def write(folder, recipe):
    """The recipe as a file of the folder."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


def refused(folder, error, *needles, recipe=RECIPE, out=None, **arguments):
    """A merge fails with one line that holds the needles, and leaves everything as it was."""
    path, out = write(folder, recipe), folder / "out" if out is None else out
    before = snapshot(folder.parent)
    with pytest.raises(error) as caught:
        polymerge.merge(path, out, device="cpu", **arguments)
    if isinstance(caught.value, PolymergeError):
        assert type(caught.value) is error, repr(caught.value)
        assert "\n" not in str(caught.value)
    for needle in needles:
        assert needle in str(caught.value), str(caught.value)
    assert snapshot(folder.parent) == before


def changed(recipe=RECIPE, **keys):
    """The recipe with other top-level keys."""
    return {**recipe, **keys}


def with_expert(name, **keys):
    """The recipe with other keys of one expert."""
    experts = {**RECIPE["experts"], name: {**RECIPE["experts"][name], **keys}}
    return changed(experts=experts)


def edit(path, **keys):
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


# ------------------------------------------------------------------------------------------- good input


def test_relative_paths_without_a_network(here, monkeypatch):
    def offline(*_args, **_keys):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.chdir(here)
    write(Path(), RECIPE)
    before = snapshot(here)
    result = polymerge.merge("recipe.yaml", "out", device="cpu")
    assert result.out == Path("out")
    after = snapshot(here)
    assert {k: v for k, v in after.items() if k.parts[0] != "out"} == before  # inputs byte for byte
    assert not list((here.parent / "scratch").iterdir())
    model = AutoModelForCausalLM.from_pretrained(here / "out")
    assert model.num_parameters() == result.parameters
    # The second run of a recipe writes the same weights.
    polymerge.merge("recipe.yaml", "again", device="cpu")
    assert (here / "again/model.safetensors").read_bytes() == (here / "out/model.safetensors").read_bytes()


def test_dry_run_writes_nothing(here):
    path = write(here, RECIPE)
    before = snapshot(here.parent)
    result = polymerge.merge(path, here / "out", device="cpu", dry_run=True)
    assert result.out is None
    assert {f.level for f in result.report.findings} == {"exact", "approximate", "warning"}
    assert snapshot(here.parent) == before


# ------------------------------------------------------------------------------------------ checkpoints


def test_missing_folder(here):
    shutil.rmtree(here / "code")
    refused(here, CheckpointError, str(here / "code"), "does not exist")


def test_half_downloaded_shards(here):
    shards = sorted((here / "code").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    refused(here, CheckpointError, shards[-1].name, "incomplete")


def test_truncated_shard(here):
    part = min((here / "code").glob("model-*.safetensors"))
    part.write_bytes(part.read_bytes()[:-100])
    refused(here, CheckpointError, str(part), "truncated")


def test_corrupt_safetensors(here):
    weights = here / "prose/model.safetensors"
    weights.write_bytes(b"\x10\0\0\0\0\0\0\0{not json at all" + weights.read_bytes()[24:])
    refused(here, CheckpointError, str(weights), "corrupt")


def test_weights_with_nan(here):
    weights = load_file(here / "prose/model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"][1, 2] = float("nan")
    save_file(weights, here / "prose/model.safetensors")
    refused(here, CheckpointError, "model.layers.0.self_attn.o_proj.weight", str(here / "prose"), "NaN")


def test_remote_code(here):
    (here / "code/modeling_mine.py").write_text("raise SystemExit('this code must never run')")
    edit(here / "code/config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    refused(here, CheckpointError, str(here / "code"), "auto_map", "Python code")


def test_remote_code_that_is_not_there_is_told(here):
    """As fetched from the hub, without it: transformers has the class."""
    named = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    edit(here / "code/config.json", auto_map=named)
    report = polymerge.merge(write(here, RECIPE), here / "out", dry_run=True).report
    assert [f.subject for f in report.of("warning") if f.subject.endswith("code")] == ["code: code"]
    polymerge.merge(here / "recipe.yaml", here / "out", device="cpu")
    assert load_for_evaluation(here / "code")[0].config.model_type == "gpt_neox"


def test_remote_code_of_an_unknown_family(here):
    (here / "code/modeling_mine.py").write_text("raise SystemExit('this code must never run')")
    edit(here / "code/config.json", model_type="mine", auto_map={"AutoModel": "modeling_mine.Mine"})
    refused(here, CheckpointError, str(here / "code"), "auto_map")


def test_unknown_family(here):
    edit(here / "code/config.json", model_type="gpt_neo")
    refused(here, FamilyError, str(here / "code"), "'gpt_neo'", "known: gemma")


def test_unknown_config_key(here):
    edit(here / "code/config.json", residual_multiplier=0.5)
    refused(here, FamilyError, str(here / "code"), "'residual_multiplier'", "0.5")


def test_unclaimed_tensor(here):
    weights = load_file(here / "prose/model.safetensors")
    weights["model.layers.0.adapter.weight"] = weights["model.norm.weight"].clone()
    save_file(weights, here / "prose/model.safetensors")
    refused(here, FamilyError, "model.layers.0.adapter.weight", str(here / "prose"))


def test_no_tokenizer(here):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (here / "code" / file).unlink()
    refused(here, CheckpointError, str(here / "code"), "tokenizer")


# ------------------------------------------------------------------------------------ recipe and texts


@pytest.mark.parametrize(
    ("recipe", "needle"),
    [
        (changed(fold={"densty": 0.5}), "fold.densty"),
        (changed(mehtod="fold"), "did you mean 'method'?"),
        (with_expert("code", weigth=1), "experts.code.weigth"),
        (changed(method="ties"), "'ties'"),
        (changed(anchor="poetry"), "'poetry'"),
    ],
)
def test_recipe(here, recipe, needle):
    refused(here, RecipeError, needle, str(here / "recipe.yaml"), recipe=recipe)


def test_other_tokenizer_of_the_same_size(here):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters[1:] + letters[:1])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    other.save_pretrained(here / "code")
    recipe = changed(method="linear")
    refused(here, PreflightError, "'prose' and 'code'", "id 0 is '!' and '\"'", recipe=recipe)


def test_missing_text(here):
    (here / "code.txt").unlink()
    refused(here, TextError, "'code'", str(here / "code.txt"))


@pytest.mark.parametrize("content", ["", "\n \n", "a few words, no more\n"])
def test_empty_or_short_text(here, content):
    (here / "code.txt").write_text(content)
    refused(here, TextError, "'code'")


def test_text_too_short_for_a_row(here):
    lines = (f"{i:04}\n" for i in range(210))  # 1050 characters, in blocks of 125
    (here / "code.txt").write_text("".join(lines))
    recipe = changed(fold={**RECIPE["fold"], "length": 128})
    refused(here, TextError, "'code'", "gives 125 tokens; one row needs 128", recipe=recipe)


def test_text_that_is_not_utf8(here):
    (here / "code.txt").write_bytes(b"\xff\xfe" * 2000)
    refused(here, TextError, "'code'", str(here / "code.txt"))


@pytest.mark.parametrize(
    ("size", "needles"),
    [
        ({"params": "0.01x"}, ("size: ", "the least is about")),
        ({"params": 100}, ("size: 100 parameters",)),
        ({"width": 2, "heads": 2}, ("size.width: 2", "each of 2 experts and one that is constant")),
    ],
)
def test_size_below_what_is_possible(here, size, needles):
    refused(here, PreflightError, *needles, recipe=changed(size=size))


# ---------------------------------------------------------------------------------------------- output


def test_existing_output(here):
    (here / "out").mkdir()
    (here / "out/precious.txt").write_text("mine")
    refused(here, OutputError, str(here / "out"), "not empty")


def test_output_that_is_a_file(here):
    (here / "out").write_text("mine")
    refused(here, OutputError, str(here / "out"), "is not a folder")


def test_output_below_a_file(here):
    refused(here, OutputError, str(here / "prose.txt"), "is a file", out=here / "prose.txt/out")


def test_output_that_may_not_be_written(here, monkeypatch):
    monkeypatch.setattr(place.os, "access", lambda *_: False)
    refused(here, OutputError, str(here / "out"), "no permission")


def test_too_little_space(here, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(here, OutputError, str(here / "out"), "1.0 kB free")


@pytest.mark.parametrize("method", ["fold", "union"])
def test_disk_that_fills_up(here, monkeypatch, method):
    written, real = 0, shard._write

    def full(*arguments):
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(shard, "_write", full)
    refused(here, OutputError, "no space left", recipe=changed(method=method), out=here / "new/parents/out")


# ---------------------------------------------------------------------------------------- interruption


class Interrupts:
    """Progress that presses Ctrl-C: in the given stage, after so many steps of it."""

    def __init__(self, stage, steps):
        self.wanted, self.left, self.now = stage, steps, None

    def stage(self, name, total=None):  # noqa: ARG002  the protocol's
        self.now = name
        self._count(0)

    def advance(self, note="", n=1):  # noqa: ARG002
        self._count(n)

    def _count(self, n):
        if self.now == self.wanted:
            self.left -= n
            if self.left <= 0:
                raise KeyboardInterrupt


HEALED = changed(heal={"tokens": 1280, "length": 16, "batch_rows": 4})


@pytest.mark.parametrize(("stage", "steps"), [("preflight", 0), ("experts", 1), ("fold", 1), ("fold", 3), ("heal", 2)])
def test_ctrl_c(here, stage, steps):
    interrupts = Interrupts(stage, steps)
    refused(here, KeyboardInterrupt, recipe=HEALED, out=here / "new/out", progress=interrupts)
    assert interrupts.now == stage
