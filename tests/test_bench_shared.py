"""Folds shared by the methods of a case: made once by whoever is first, whole or again, gone when the case is done."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_bench import tiny  # noqa: F401  a fixture

from polymerge import bench
from polymerge.bench import cells, machine, modular_bed, shared
from polymerge.bench.locks import held
from polymerge.bench.methods import Outcome
from polymerge.bench.modular_bed import ModularBed
from polymerge.bench.shared import Shared
from polymerge.clock import Clock


def maker(made, text="whole"):
    """Takes 50 ms."""

    def make(folder):
        folder.mkdir()
        (folder / "model").write_text(text)
        made.append(text)
        time.sleep(0.05)
        return Outcome({"skill": 0.5}, 7, {"layers": 2}, flops=9, extra={"balance": (1.0, float("inf"))})

    return make


def test_the_second_who_asks_is_given_what_the_first_made_and_told_what_it_took(tmp_path):
    made = []
    one, other = Shared(tmp_path), Shared(tmp_path)
    folder, first = one.model("fold", maker(made))
    again, second = other.model("fold", maker(made))
    assert made == ["whole"]
    assert folder == again
    assert first.reused == second.reused
    assert 0.05 <= first.reused[0] <= one.spent[0]
    assert other.spent[0] < one.spent[0]
    one.begin()
    assert one.spent == (0.0, 0.0)
    assert (second.scores, second.parameters, second.size, second.flops) == ({"skill": 0.5}, 7, {"layers": 2}, 9)
    assert second.extra == {"balance": [1.0, float("inf")]}


def test_a_models_peak_is_in_its_note_and_not_that_of_the_method_that_made_it(tmp_path, monkeypatch):
    peaks = iter((3, 8))  # what the process held before, what the making took
    monkeypatch.setattr(shared, "peak", lambda _device: next(peaks))
    monkeypatch.setattr(shared, "reset_peak", lambda _device: None)
    one = Shared(tmp_path)
    assert one.model("fold", maker([]))[1].peak_bytes == 8
    assert one.peak_bytes == 3
    assert Shared(tmp_path).model("fold", maker([]))[1].peak_bytes == 8


def test_the_seconds_of_a_child_that_has_ended_count():
    clock = Clock()
    with clock("child"):
        subprocess.run([sys.executable, "-S", "-c", "sum(range(10**7))"], check=True)
    assert clock.cpu_seconds["child"] > 0.05
    assert machine.children_peak("cpu") > 10**6
    assert machine.children_peak("cuda:0") == 0


def test_half_a_model_is_made_again(tmp_path):
    def killed(folder):
        maker([], "half")(folder)
        raise KeyboardInterrupt

    made = []
    with pytest.raises(KeyboardInterrupt):
        Shared(tmp_path).model("fold", killed)
    folder, _ = Shared(tmp_path).model("fold", maker(made))
    assert made == ["whole"]
    assert (folder / "model").read_text() == "whole"


def test_a_run_that_is_stopped_goes_on_with_its_fold_and_leaves_nothing(tiny, monkeypatch):  # noqa: F811
    heal = ModularBed.fold_heal

    def stop(_bed):
        raise KeyboardInterrupt

    monkeypatch.setattr(ModularBed, "fold_heal", stop)
    with pytest.raises(KeyboardInterrupt):
        bench.run("modular", "quick", tiny, ["fold", "fold_heal"], device="cpu")
    monkeypatch.setattr(ModularBed, "fold_heal", heal)
    monkeypatch.setattr(modular_bed, "folded", lambda *_a, **_k: pytest.fail("folded again"))
    fold, healed = bench.run("modular", "quick", tiny, ["fold", "fold_heal"], device="cpu")
    assert healed.seconds > fold.seconds > 0
    assert healed.flops > fold.flops
    assert not list(tiny.glob(".work/*/*"))


def test_only_the_methods_that_are_the_fold_are_charged_with_it(tiny, monkeypatch):  # noqa: F811
    real, long = modular_bed.folded, 1.0

    def folded(experts, *args, **keys):
        begun = time.process_time()
        while len(experts) > 1 and time.process_time() < begun + long:
            pass
        return real(experts, *args, **keys)

    monkeypatch.setattr(modular_bed, "folded", folded)
    [made_it] = bench.run("modular", "quick", tiny, ["linear"], device="cpu")
    fold, found_it = bench.run("modular", "quick", tiny.with_name("other"), ["fold", "linear"], device="cpu")
    assert fold.cpu_seconds > long
    assert made_it.cpu_seconds < found_it.cpu_seconds + 0.5 * long
    assert made_it.flops == found_it.flops < fold.flops


def test_a_fold_that_another_process_still_works_on_is_left(tiny):  # noqa: F811
    def run():
        bench.run("modular", "quick", tiny, ["fold"], device="cpu")
        return list(tiny.glob(".work/*/*"))

    with held(cells.claim(tiny, "modular", "quick", "cross/plus+minus", 0, "shrink")):
        assert run()
    assert not run()


def test_nobody_begins_at_a_case_while_what_it_shares_is_deleted(tiny, monkeypatch):  # noqa: F811
    claim, remove, free = cells.claim(tiny, "modular", "quick", "cross/plus+minus", 0, "shrink"), shutil.rmtree, []

    def removing(folder, **kwargs):
        if Path(folder).parent.parent.name == ".work":  # all that a case shares, and not a half-made model of it
            with held(claim, wait=False) as mine:
                free.append(mine)
        remove(folder, **kwargs)

    monkeypatch.setattr(cells.shutil, "rmtree", removing)
    bench.run("modular", "quick", tiny, ["fold"], device="cpu")
    assert free == [False]
