"""The text suite: its experts are build products that read calibration text only; every method gives bits per byte."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polymerge import bench, methods
from polymerge.bench import lm, text, text_bed, text_experts
from polymerge.bench.flops import Products
from polymerge.bench.methods import Case
from polymerge.bench.text_distil import operations
from polymerge.bench.text_experts import DOMAINS, PLANS, Workshop
from polymerge.calibrate import written
from polymerge.calibrate.texts import first
from polymerge.errors import PolymergeError, PreflightError
from polymerge.model.source import Source
from polymerge.model.target import load_student
from polymerge.recipe import Fold

FEW = text.Detail(heal_tokens=4096, lrs=(3e-4,), fold={"tokens": 2048, "refine": 0}, test_rows=8)
SHORT = lm.Training(tokens=4 * 64 * 8, context=64, batch=4, checks=2)


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder with a text for every domain; no two documents of it are equal."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, domain in DOMAINS.items():
        for file in domain.files:
            lines = [f"{name} says {i * 7919 % 1009} and then {i * i % 97} for the {i}th time" for i in range(1200)]
            if file.endswith(".jsonl"):
                lines = [json.dumps({domain.field: f"{a}\n{b}"}) for a, b in zip(lines[::2], lines[1::2], strict=True)]
            (folder / file).write_text("\n".join(lines) + "\n")
    return folder


# ---------------------------------------------------------------------- experts


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_is_a_model_that_the_tool_reads(name, tmp_path):
    model, size = text_experts.model_of(PLANS[name], 0), PLANS[name].size
    about = float(size.removesuffix("m")) * 1e6 if size else 1e6
    assert 0.5 * about < model.num_parameters() < 1.5 * about
    model.save_pretrained(tmp_path)
    spec, plan = Source(tmp_path).spec, PLANS[name]
    assert (spec.family, spec.layers, spec.width, spec.heads) == (plan.family, plan.layers, plan.width, plan.heads)
    assert (spec.kv_heads, spec.mlp) == (plan.kv_heads, plan.mlp)


def test_an_axis_is_one_difference():
    base = PLANS["shakespeare"]
    for axis, keys in {
        "seed": "",
        "depth": "layers",
        "width": "width heads kv_heads mlp",
        "heads": "heads kv_heads",
        "tokenizer": "speaks",
    }.items():
        other = PLANS[f"python/{axis}"]
        different = {key for key in vars(base) if getattr(base, key) != getattr(other, key)}
        assert different == {"domain", *keys.split()}
    assert PLANS["python/family"].family != base.family


def test_experts_of_one_architecture_begin_apart():
    one, other = (text_experts.model_of(PLANS[name], 0).state_dict() for name in ("shakespeare", "python/seed"))
    assert all(one[key].shape == other[key].shape for key in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_an_expert_is_trained_once_and_never_on_held_out_text(texts, tmp_path, monkeypatch):
    seen: list[str] = []
    real, real_tokenizer = lm.stream, lm.make_tokenizer
    monkeypatch.setattr(lm, "stream", lambda tokenizer, some: seen.extend(some) or real(tokenizer, some))
    monkeypatch.setattr(lm, "make_tokenizer", lambda some, size: seen.extend(some) or real_tokenizer(some, size))
    make = lambda: Workshop(texts, 0, training=SHORT, cache=tmp_path / "cache")  # noqa: E731
    first = make().expert(PLANS["stories"])
    skills = [make().skill(name) for name in text_experts.tokenizer_of("stories")[1].domains]
    held = {d for skill in skills for d in (*skill.validation, *skill.test)}
    assert seen
    assert not held & set(seen)
    assert not {d[:40] for d in held} & {s[:40] for s in seen}
    assert first.record["tokens"] == SHORT.tokens
    assert len(first.record["curve"]) == SHORT.checks
    assert first.record["best_val_bpb"] == min(point["val_bpb"] for point in first.record["curve"])
    monkeypatch.setattr(lm, "train", lambda *_, **__: pytest.fail("trained again"))
    assert make().expert(PLANS["stories"]).folder == first.folder


def test_a_tuned_expert_starts_from_its_base(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(text_experts, "TUNING", lm.Training(tokens=4 * 64, context=64, batch=4, lr=1e-9, checks=1))
    workshop = Workshop(texts, 0, training=SHORT, cache=tmp_path / "cache")
    plan = PLANS["python/tuned"]
    base, tuned = workshop.expert(PLANS[plan.base]), workshop.expert(plan)
    theirs, own = (Source(e.folder).layer(0)["q.weight"] for e in (base, tuned))
    torch.testing.assert_close(own, theirs, atol=1e-6, rtol=0)
    assert not torch.equal(own, theirs)
    assert tuned.record["depends"]["plan"]["base"] == base.folder.name
    assert "base" not in base.record["depends"]["plan"]


def test_another_text_or_seed_is_another_expert(texts, tmp_path):
    def spoken(seed: int) -> Path:
        return Workshop(texts, seed, training=SHORT, cache=tmp_path / "cache").tokenizer(*PLANS["wiki"].tokenizer)

    found = [spoken(0), spoken(1)]
    with (texts / DOMAINS["wiki"].files[0]).open("a") as file:
        file.write("one line more\n")
    assert len({*found, spoken(0)}) == 3


def test_training_is_deterministic(texts, tmp_path):
    made = [Workshop(texts, 0, training=SHORT, cache=tmp_path / name).expert(PLANS["stories"]) for name in "ab"]
    one, other = ((e.folder / "model.safetensors").read_bytes() for e in made)
    assert one == other


def test_training_that_diverges_says_so(texts, tmp_path):
    workshop = Workshop(texts, 0, training=replace(SHORT, lr=1e30), cache=tmp_path / "cache")
    with pytest.raises(PolymergeError, match="no finite loss in 8 steps"):
        workshop.expert(PLANS["stories"])
    assert not [folder for folder in (tmp_path / "cache").iterdir() if "stories" in folder.name and folder.is_dir()]


def test_products_are_counted_forwards_and_backwards():
    x, w = torch.randn(3, 5), torch.randn(7, 5, requires_grad=True)
    with Products() as products:
        (torch.nn.functional.linear(x, w, torch.zeros(7)) ** 2).sum().backward()
        torch.bmm(torch.randn(2, 3, 4), torch.randn(2, 4, 6))
    assert products.flops == 2 * (2 * 3 * 5 * 7) + 2 * 2 * 3 * 4 * 6


# ---------------------------------------------------------------------- cases


def test_the_full_profile_has_every_axis_and_more_than_two_experts():
    cases = text.cases("full")
    assert len({c.name for c in cases}) == len(cases)
    axes = [c.detail.axis for c in cases if c.detail.axis and c.detail.budget == "sum"]
    assert axes == [*text_experts.AXES, "bases"]
    assert {3, 4} <= {len(c.detail.experts) for c in cases}
    named = {name for case in cases for name in case.detail.experts}
    larger = {name for case in text.cases("large") for name in case.detail.experts}
    assert named | larger | {PLANS[n].base for n in named} - {""} == set(PLANS)
    assert {PLANS[name].size for name in larger} == set(text_experts.TRAININGS)
    assert len({PLANS[n].family for n in named}) == 6
    medium = {c.name: c.detail for c in text.cases("medium")}
    assert set(medium) == {c.name for c in cases if c.detail.budget == "sum" or c.detail.axis == "base"}
    assert {d.heal_tokens for d in medium.values()} == {100_000}
    unseen = {name for name, d in medium.items() if d.fold != {"refine": 240}}
    assert unseen == {"sherlock+java/sum", "java+scan/sum"}
    assert all(medium[name].fold == {} for name in unseen)
    assert not {e for name in unseen for e in medium[name].experts} & {
        e for name, d in medium.items() if name not in unseen for e in d.experts
    }
    scarce = [d for d in medium.values() if d.text is not None]
    assert {(d.text, d.written) for d in scarce} == set(text.SCARCE)
    assert len(scarce) == 2 * len(text.SCARCE)
    [quick] = text.cases("quick")
    assert quick.detail.fold["tokens"] < Fold().tokens


def test_a_case_lacks_the_texts_of_its_own_tokenizer_alone(texts):
    small, large = text.cases("full")[-1], text.cases("large")[0]
    (texts / "darwin.txt").unlink()
    assert text.lacking(small, texts) == ""
    assert text.lacking(large, texts) == f"needs darwin.txt in {texts}"
    assert "darwin.txt" not in text.lacking(small, None)
    assert text.lacking(text.cases("quick")[0], None) == ""


def test_without_texts_the_shipped_pair_alone_runs_and_a_line_for_each_tokenizer_says_so(texts, tmp_path, monkeypatch):
    monkeypatch.delenv("POLYMERGE_TEXTS", raising=False)
    lines = bench.left_out("text", "full")
    assert all(line.endswith("by --texts") for line in lines)
    for file, line in zip(("shakespeare.txt", "sherlock.txt"), lines, strict=True):
        assert f"cannot: needs a folder with {file}" in line
    with pytest.raises(PreflightError, match="needs a folder"):
        bench.run("text", "full", tmp_path, cases=["gsm8k+stories/sum"])
    (texts / "code-rust.txt").unlink()
    assert "needs code-rust.txt in" in bench.left_out("text", "full", texts)[0]
    assert bench.left_out("all", "quick", texts) == []
    ran: list[str] = []
    monkeypatch.setattr(text_bed, "TextBed", lambda case, *_, **__: ran.append(case.name) or stop())
    bench.run("text", "full", tmp_path / "out", ["union"], device="cpu")
    assert ran == [f"prose+code/{b}" for b in ("1.0x", "sum", "1.5x", "union")]


def stop() -> None:
    raise PreflightError("enough")


# ---------------------------------------------------------------------- methods


@pytest.mark.slow
def test_every_method_of_the_text_suite_gives_bits_per_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "cases", lambda _profile: [Case("prose+code/1.5x", "text", FEW)])
    names = ["union", "fold", "fold_heal", "anchor", "best_expert", "ensemble", "anchor_distill", "scratch_distill"]
    names += ["fuse_distill", "linear", "anchor_distill_more", "fold_heal_more"]
    more = ["shrink", "placebo", "mergekit_ties"]
    rows = {r.method: r for r in bench.run("text", "quick", tmp_path, [*names, *more], device="cpu")}
    assert set(rows) == {*names, *more}
    done = {name: row for name, row in rows.items() if row.status == "ok"}
    assert set(names) <= set(done)
    assert all(set(row.scores) == {"prose", "code"} and min(row.scores.values()) > 0 for row in done.values())
    owners = rows["fold"].owners
    assert all(rows["union"].scores[skill] < owner + 0.05 for skill, owner in owners.items())
    assert rows["anchor"].scores["prose"] == owners["prose"]
    assert rows["fold_heal"].worst < rows["fold"].worst < rows["placebo"].worst
    assert rows["fold"].parameters == rows["scratch_distill"].parameters == rows["placebo"].parameters
    assert rows["anchor_distill"].parameters <= rows["fold"].parameters
    spent = rows["fold"].flops + rows["anchor_distill"].flops
    assert rows["anchor_distill_more"].flops == pytest.approx(spent, rel=0.2)  # whole steps, another shape
    assert rows["anchor_distill_more"].tokens > rows["anchor_distill"].tokens
    lean = rows["fold_heal_more"]
    assert lean.flops == pytest.approx(rows["fold_heal"].flops, rel=0.2)
    assert lean.tokens > rows["fold_heal"].tokens
    assert rows["fold_heal"].flops > rows["fold"].flops > rows["shrink"].flops > 0
    assert "code translated from gpt_neox" in rows["linear"].notes
    assert "common base model" in rows["mergekit_ties"].reason


def bed_of(tmp_path, **detail: object) -> text_bed.TextBed:
    return text_bed.TextBed(Case("prose+code/few/sum", "scarce", replace(FEW, **detail)), 0, tmp_path)


def test_an_anchor_that_can_be_no_result_is_counted_and_padded_as_what_the_fold_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["polymerge.merge"], "TEST_ROWS", 8)
    few = {"tokens": 2048, "refine": 0, "trials": False}
    bed = bed_of(tmp_path, anchor="code", fold=few)
    fold, padded, spread = bed.fold(), bed.anchor_distill(), bed.rival(methods.rival("linear")())
    assert bed.sources["code"].spec.family == "gpt_neox"
    assert fold.size["family"] == padded.size["family"] == spread.size["family"] == "llama"
    assert bed.fold_heal().parameters == fold.parameters
    assert "code translated from gpt_neox" in padded.notes
    assert padded.scores["code"] < padded.scores["prose"]


def rows_distilled(bed: text_bed.TextBed, monkeypatch) -> dict[str, int]:
    """Rows of each skill that a distilled method is given."""
    read: dict[str, int] = {}
    monkeypatch.setattr(
        text_bed,
        "at_best_rate",
        lambda _student, _teachers, rows, *_, **__: read.update({k: len(r.tokens) for k, r in rows.items()}) or stop(),
    )
    with pytest.raises(PreflightError):
        bed._distilled(lambda: None, bed.sources["prose"].spec)
    return read


def test_operations_count_every_teacher_that_reads_a_row():
    own, fused = (operations(100, 30, 2, [10, 20], fused=fused) for fused in (False, True))
    assert own == 2 * 6 * 100 * 30 + 2 * (10 + 20) * 30  # half of the rows of two runs each
    assert fused == 2 * 6 * 100 * 30 + 2 * (10 + 20) * 60


def test_with_little_text_no_method_reads_more(tmp_path, monkeypatch):
    bed = bed_of(tmp_path, text=1024)
    assert bed.recipe.fold.tokens == 1024
    assert rows_distilled(bed, monkeypatch) == {"prose": 8, "code": 8}


def test_what_experts_write_to_little_text_every_method_reads(tmp_path, monkeypatch):
    for name, small in {"BATCH": 8, "LENGTH": 64, "PROMPT": 8}.items():
        monkeypatch.setattr(written, name, small)
    whole = bed_of(tmp_path / "whole", text=None)
    bed = bed_of(tmp_path / "written", text=1024, written=True, fold=FEW.fold | {"trials": False})
    assert bed.recipe.fold.tokens == FEW.fold["tokens"]
    for name, skill in bed.texts.items():
        real = skill.calibration[: -skill.written]
        assert "".join(real) == "".join(first(whole.texts[name].calibration, bed.tokenizer, 1024))
        assert (skill.validation, skill.test) == (whole.texts[name].validation, whole.texts[name].test)
    assert min(rows_distilled(bed, monkeypatch).values()) >= FEW.fold["tokens"] // 128
    none = bed_of(tmp_path / "none", text=0, written=True)
    for name, skill in none.texts.items():
        assert skill.test == whole.texts[name].test
        assert skill.written >= len(skill.calibration) + len(skill.validation)
        assert not {*skill.calibration, *skill.validation} & {*whole.texts[name].calibration, *skill.test}
    assert min(rows_distilled(none, monkeypatch).values()) >= FEW.fold["tokens"] // 128
    folder, fold = bed._folded()
    assert fold.scores == bed._measured(load_student(folder), bed._target()).scores
    assert fold.flops > 0
    assert set(fold.extra) == {"knobs", "balance", "trials"}


def test_an_expert_with_a_tokenizer_of_its_own_is_read_by_every_method(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_experts.lm, "Training", lambda: replace(SHORT, tokens=16 * SHORT.tokens))
    monkeypatch.setattr(sys.modules["polymerge.merge"], "TEST_ROWS", 8)
    few = {"tokens": 2048, "refine": 0, "trials": False}
    detail = replace(FEW, experts=("shakespeare", "python/tokenizer"), anchor="shakespeare", budget="sum", fold=few)
    bed = text_bed.TextBed(Case("two/sum", "text", detail), 0, tmp_path, texts=texts)
    assert bed.foreign == ("python",)
    own, told = bed.readers["python"].told(bed.test["python"].tokens)
    assert own < bed.owners["python"] < 1.3 * told  # nearly what its own tokens give, and no garbage
    with pytest.raises(PreflightError, match="piece by piece, which is slow"):
        bed.union()
    fold, spread, padded = bed.fold(), bed.rival(methods.rival("linear")()), bed.anchor_distill()
    assert 0.9 * sum(bed.expert_parameters.values()) < fold.parameters <= sum(bed.expert_parameters.values())
    assert fold.size["layers"] == spread.size["layers"] == 4
    assert "python translated from llama and its own tokens by our fold alone first" in spread.notes
    assert "translated" not in padded.notes
    assert bed.placebo().scores["python"] > fold.scores["python"]
    assert set(bed.ensemble().scores) == set(bed.fuse_distill().scores) == {"shakespeare", "python"}


@pytest.mark.slow
def test_three_trained_experts_merge_at_the_sum_of_their_sizes(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_experts.lm, "Training", lambda: SHORT)
    names = ("shakespeare", "python/all", "gsm8k")
    detail = replace(FEW, experts=names, anchor="shakespeare", budget="sum")
    monkeypatch.setattr(text, "cases", lambda _profile: [Case("three/sum", "text", detail)])
    wanted = ["union", "fold", "fold_heal", "anchor_distill", "ensemble", "mergekit_slerp", "linear"]
    rows = {r.method: r for r in bench.run("text", "full", tmp_path / "out", wanted, device="cpu", texts=texts)}
    fold = rows["fold"]
    assert set(fold.scores) == {"shakespeare", "python", "gsm8k"}
    assert 0.9 * sum(fold.expert_parameters.values()) < fold.parameters <= sum(fold.expert_parameters.values())
    assert rows["fold_heal"].status == rows["anchor_distill"].status == rows["union"].status == "ok"
    assert "two experts" in rows["mergekit_slerp"].reason
    assert "python translated from gpt_neox" in rows["linear"].notes
    assert "gsm8k translated from qwen2" in rows["linear"].notes  # its biases have no place in a llama
    assert fold.setting["training"]["gsm8k"]["tokens"] == SHORT.tokens
