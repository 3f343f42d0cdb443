"""A whole merge on tiny experts: what comes out loads anywhere, is the same every time, and can be resumed."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_tiny_model
from rich.console import Console

import polymerge
from polymerge.calibrate.texts import read_skill
from polymerge.errors import OutputError, PreflightError
from polymerge.evaluate import bits_per_byte
from polymerge.readers import TEST_ROWS, rows_of
from polymerge.report import terminal

RECIPE = {
    "method": "fold",
    "anchor": "prose",
    "experts": {
        "prose": {"model": "prose", "text": ["prose.txt"]},
        "code": {"model": "code", "text": "code.txt"},
    },
    "size": {"params": "1.5x"},
    "fold": {"length": 16, "tokens": 640, "refine": 3},
    "heal": {"tokens": "1k", "batch_rows": 8, "length": 16},
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    save_tiny_model(folder / "prose", hidden_size=32, num_hidden_layers=1)
    save_tiny_model(folder / "code", "gpt_neox", hidden_size=24, num_attention_heads=2, num_hidden_layers=2, seed=1)
    for name, word in (("prose", "apple pie"), ("code", "x = y[3]")):
        (folder / f"{name}.txt").write_text("".join(f"{word} {i * i}\n" for i in range(600)))
    return folder


def write(folder, **changes):
    path = folder / f"recipe-{abs(hash(str(changes)))}.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def merged(folder):
    return polymerge.merge(write(folder), folder / "merged")


def files(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_result_is_a_stock_checkpoint_that_generates(merged):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged.out)
    tokenizer = AutoTokenizer.from_pretrained(merged.out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    assert not list(merged.out.glob("*.py"))
    ids = tokenizer("apple", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 4
    assert sum(p.numel() for p in model.parameters()) == merged.parameters
    assert 0.97 * 1.5 <= merged.parameters / max(merged.expert_parameters.values()) <= 1.5


def test_what_is_said_of_it_was_measured_on_what_the_file_holds(merged):
    """To the last digit: rounding a model for the file must not round what the file does not hold."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged.out)
    model = AutoModelForCausalLM.from_pretrained(merged.out, dtype=torch.float32)
    skills = {k: read_skill(k, (merged.out.parent / f"{k}.txt",)) for k in merged.skills}
    test = rows_of(skills, "test", tokenizer, RECIPE["fold"]["length"], TEST_ROWS)
    assert {k: bits_per_byte(model, rows) for k, rows in test.items()} == {
        k: row["healed"] for k, row in merged.skills.items()
    }


def test_result_has_its_papers(merged):
    card = (merged.out / "README.md").read_text()
    assert "base_model_relation: merge" in card
    assert "method: fold" in card
    lock = json.loads((merged.out / "polymerge-lock.json").read_text())
    assert lock["knobs"] == merged.knobs
    assert set(lock["texts"]) == {"prose", "code"}
    assert len(lock["calibration"]) == 64


def test_summary_is_plain_json(merged):
    summary = json.loads(json.dumps(merged.summary()))
    assert set(summary["skills"]["code"]) == {"owner", "union", "fold", "healed", "experts"}
    assert summary["worst_skill"]["name"] in ("prose", "code")
    assert summary["seconds"] == pytest.approx(sum(v for k, v in summary["stage_seconds"].items() if k != "total"))
    assert summary["peak_bytes"] > 0


def test_healing_does_not_make_the_worst_skill_worse(merged):
    worst = [max(p["validation"][k] for k in ("prose", "code")) for p in merged.heal_curve]
    assert min(p["worst"] for p in merged.heal_curve) <= merged.heal_curve[0]["worst"]
    assert worst


SCRIPT = "import sys, polymerge; polymerge.merge(sys.argv[1], sys.argv[2])"


@pytest.mark.parametrize("seed", ["1", "2"])
def test_bytes_are_the_same_in_another_process(merged, folder, seed):
    """Whatever PYTHONHASHSEED."""
    out = folder / f"again{seed}"
    code = f"import torch; torch.set_num_threads(1); {SCRIPT}"
    subprocess.run(
        [sys.executable, "-c", code, str(write(folder)), str(out)],
        check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed},
    )  # fmt: skip
    assert files(out) == files(merged.out)


def test_dry_run_writes_nothing(folder):
    result = polymerge.merge(write(folder), folder / "dry", dry_run=True)
    assert result.out is None
    assert result.report.findings
    assert not (folder / "dry").exists()


def test_keys_are_a_recipe_too_and_say_the_same(folder):
    experts = {
        name: {"model": str(folder / one["model"]), "text": str(folder / f"{name}.txt")}
        for name, one in RECIPE["experts"].items()
    }
    result = polymerge.merge({**RECIPE, "experts": experts}, folder / "dry", dry_run=True)
    assert result.parameters == result.report.parameters
    assert 1.3 < result.parameters / max(result.expert_parameters.values()) <= 1.5
    with pytest.raises(PreflightError, match="device: 'gpu'; expected auto, cpu or cuda"):
        polymerge.merge(write(folder), folder / "dry", device="gpu", dry_run=True)


def test_one_expert_without_a_size_keeps_its_own(folder):
    expert = {"prose": {"model": str(folder / "prose"), "text": str(folder / "prose.txt")}}
    asked = {"method": "fold", "anchor": "prose", "experts": expert, "fold": RECIPE["fold"]}
    result = polymerge.merge(asked, folder / "dry", dry_run=True)
    assert result.parameters <= 1.01 * result.expert_parameters["prose"]


@pytest.mark.parametrize(
    ("out", "work", "message"),
    [
        ("wo", "wo", "in each other's way"),
        ("wo", "wo/work", "in each other's way"),
        ("wk/fold", "wk", "in each other's way"),
        ("wk/heal/out", "wk", "in each other's way"),
        ("prose/out", None, "which 'prose' is read from"),
        (".", None, "the folder that this runs in"),
    ],
)
def test_places_in_each_others_way_are_refused_before_anything_runs(out, work, message, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    place = Path() if out == "." else folder / out
    with pytest.raises(OutputError, match=message):
        polymerge.merge(write(folder), place, work=work and folder / work)
    assert not (folder / "wo").exists()
    assert not (folder / "wk").exists()


def test_work_folder_saves_the_fold_and_refuses_another(merged, folder):
    work = folder / "work"
    polymerge.merge(write(folder), folder / "first", work=work)
    second = polymerge.merge(write(folder), folder / "second", work=work)
    assert "choose" not in second.seconds
    assert {n: f.digest() for n, f in second.features.items()} == {n: f.digest() for n, f in merged.features.items()}
    assert second.features
    assert files(folder / "second") == files(merged.out)
    with pytest.raises(OutputError, match="holds the work of another merge"):
        polymerge.merge(write(folder, seed=1), folder / "third", work=work)
    assert not (folder / "third").exists()


def test_union_holds_both_experts_and_keeps_the_bound(folder):
    from transformers import AutoModelForCausalLM

    result = polymerge.merge(write(folder, method="union", union={"alpha": 0}), folder / "union")
    model = AutoModelForCausalLM.from_pretrained(result.out, trust_remote_code=True)
    assert len(model.experts) == 2
    for row in result.skills.values():
        assert row["union"] <= min(row["experts"].values()) + 0.7 / 15 + 1e-6  # ln 2 nats a row of 15 scored bytes


def test_labels_are_not_needed(folder):
    gate = {**RECIPE["fold"], "ownership": "gate", "trials": False}
    result = polymerge.merge(write(folder, fold=gate, heal=None), folder / "gate")
    assert all(row["fold"] is not None for row in result.skills.values())


def test_three_experts_merge(folder):
    save_tiny_model(folder / "third-expert", "gpt2", hidden_size=16, n_head=2, seed=2)
    experts = {**RECIPE["experts"], "prose2": {"model": "third-expert", "text": "prose.txt"}}
    fold = {**RECIPE["fold"], "trials": False}
    result = polymerge.merge(write(folder, experts=experts, heal=None, fold=fold), folder / "three")
    assert set(result.skills) == {"prose", "code", "prose2"}


def test_of_two_experts_of_one_skill_the_better_one_is_kept(folder):
    """Neither labels nor a larger budget make a worse expert's say count."""
    import shutil

    save_tiny_model(folder / "noise", hidden_size=32, num_hidden_layers=1, initializer_range=0.5, seed=5)
    shutil.copy(folder / "prose.txt", folder / "same.txt")
    (folder / "same.txt").write_text((folder / "prose.txt").read_text().replace("pie", "tart"))
    experts = {"prose": RECIPE["experts"]["prose"], "same": {"model": "noise", "text": "same.txt"}}
    result = polymerge.merge(write(folder, experts=experts, heal=None, dtype="float32"), folder / "kept")
    assert result.owners == {"prose": "prose", "same": "prose"}
    for row in result.skills.values():
        assert row["fold"] == pytest.approx(row["experts"]["prose"], abs=2e-3)
        assert row["owner"] == row["experts"]["prose"]  # what "over owner" is over
    assert result.summary()["left_out"] == ["same"]
    card = (result.out / "README.md").read_text()
    assert "held-out text in rows of 16 tokens;" in card
    shown = Console(width=200, file=io.StringIO())
    shown.print(terminal.merged(result.summary(), "out"))
    said = " ".join(shown.file.getvalue().split())
    assert "test text in rows of 16 tokens," in said
    assert "without same: others predict its text better" in said
    assert "Without same: others predict its text better." in card
    assert "noise" not in card.split("---")[1]  # whose weights are none of its base models
