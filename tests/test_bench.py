"""The benchmark: its trainer, its rows, and a whole run of a tiny suite, killed in the middle."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch

from polymerge import bench
from polymerge.bench import answers, board, cells, machine, methods, modular, train
from polymerge.bench.distil import Distil, Lesson, distil
from polymerge.bench.graph import set_rate
from polymerge.bench.locks import held
from polymerge.bench.methods import Case
from polymerge.bench.modular_bed import ModularBed
from polymerge.bench.rows import Row, Store, summarise
from polymerge.bench.tasks import TASKS, Arithmetic
from polymerge.errors import OutputError, PolymergeError, PreflightError
from polymerge.methods import fold as folding
from polymerge.methods._refine import Refine
from polymerge.model import decoder

SMALL = Arithmetic(modulus=7, degree=3)
TINY = modular.Settings(
    arithmetic=SMALL,
    training=train.Training(steps=200, lr=3e-3, weight_decay=0.0, warmup=10, batch=64, draws=64, enough=20),
    fold=folding.Settings(refine=Refine(steps=4, rows=16, head_steps=4), trials=None, basis_rows=64, batch=64),
    distil=Distil(steps=4, batch=16, lrs=(1e-3,), every=2),
)
PLUS = modular.ExpertPlan("x_plus_y", 1, 32, 2, share=0.8)
MINUS = modular.ExpertPlan("x_minus_y", 2, 48, 3, share=0.8)


def weights_of(plan):
    spec = modular.spec_of(plan, SMALL)
    return spec, answers.initial(spec, torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- tasks and trainer


@pytest.mark.parametrize("task", TASKS)
def test_tasks_have_every_pair_once_with_the_right_answer(task):
    rows = SMALL.rows(task)
    assert len(rows) == {"x_div_y": 42, "permutation": 36}.get(task, 49)
    assert len(rows[:, [0, 2]].unique(dim=0)) == len(rows)
    assert rows.max() < SMALL.vocab
    x, _, y, answer = rows.T
    if task == "x_div_y":
        assert torch.equal(answer * y % 7, x)
    if task == "permutation":  # a group: every row and column of its table is a permutation of it
        assert all(len(answer[x == a].unique()) == 6 and len(answer[y == a].unique()) == 6 for a in x.unique())


def test_split_is_a_partition_that_depends_on_the_seed():
    split = SMALL.split("x_plus_y", 0)
    parts = torch.cat([split.train, split.validation, split.test])
    assert torch.equal(parts.unique(dim=0), SMALL.rows("x_plus_y").unique(dim=0))
    assert len(split.train) == 24
    assert not torch.equal(split.train, SMALL.split("x_plus_y", 1).train)


def test_the_full_vocabulary_is_the_seed_experiments():
    assert Arithmetic().vocab == 222
    assert len(Arithmetic().rows("permutation")) == 14400


@pytest.mark.parametrize("plan", [PLUS, MINUS, modular.ExpertPlan("permutation", 3, 32, 4)])
def test_prefix_deduplication_gives_the_loss_and_gradients_of_the_plain_pass(plan):
    spec, start = weights_of(plan)
    rows = torch.cat([SMALL.rows("x_plus_y"), SMALL.rows("permutation")])[::3]
    grads = []
    for deduplicated in (True, False):
        weights = train.to(start, "cpu")
        if deduplicated:
            logits = answers.answers(spec, weights, rows)
        else:
            x = decoder.embed(spec, weights[None], rows[:, :3])
            for layer in range(spec.layers):
                x = decoder.layer(spec, weights[layer], x).out
            logits = decoder.logits(spec, weights[None], x)[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, rows[:, 3])
        loss.backward()
        grads.append((loss.detach(), weights[0]["k.weight"].grad, weights[None]["embed.weight"].grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def trained(spec, rows, validation, settings, seed):
    return train.together(spec, [train.Study(rows, validation, seed)], settings)[0]


def test_training_learns_sums_and_is_deterministic():
    split = SMALL.split("x_plus_y", 0, 0.8)
    spec, _ = weights_of(PLUS)
    runs = [trained(spec, split.train, split.validation, TINY.training, 0) for _ in range(2)]
    assert runs[0].final["final_train_acc"] > 0.9
    assert runs[0].curve[0]["train_loss"] > 3 * runs[0].final["final_train_loss"]
    timeless = {"seconds": 0, "cpu_seconds": 0}
    assert runs[0].summary() | timeless == runs[1].summary() | timeless
    assert torch.equal(runs[0].weights[0]["q.weight"], runs[1].weights[0]["q.weight"])


def test_experts_trained_side_by_side_learn_as_they_do_alone():
    tasks = [("x_plus_y", 0.8, 0), ("permutation", 0.5, 0), ("x_plus_y", 0.5, 1)]  # of different lengths
    splits = [(SMALL.split(task, seed, share), seed) for task, share, seed in tasks]
    spec, _ = weights_of(PLUS)
    settings = replace(TINY.training, steps=60, target=0.02, enough=0)  # each stops when it will
    stack = train.together(spec, [train.Study(s.train, s.validation, seed) for s, seed in splits], settings)
    alone = [trained(spec, s.train, s.validation, settings, seed) for s, seed in splits]
    assert len({one.steps for one in alone}) > 1
    for a, b in zip(stack, alone, strict=True):
        assert (a.steps, a.best_step, a.step_val_acc_99) == (b.steps, b.best_step, b.step_val_acc_99)
        assert a.final == pytest.approx(b.final, rel=1e-3)
        torch.testing.assert_close(a.weights[0]["down.weight"], b.weights[0]["down.weight"], atol=1e-4, rtol=1e-3)


def test_stacks_hold_what_the_cache_lacks_and_nobody_trains(tmp_path, monkeypatch):
    near, wide = replace(PLUS, task="x_minus_y"), replace(PLUS, width=2 * PLUS.width)
    settings = replace(TINY, training=replace(TINY.training, steps=10))
    orders = [modular.Order(plan, settings, seed, tmp_path) for seed in (0, 1) for plan in (PLUS, near, wide)]
    stacks = []

    def together(spec, studies, *args, **more):
        stacks.append((spec.width, len(studies)))
        return train.together(spec, studies, *args, **more)

    monkeypatch.setattr(modular, "together", together)
    folder, record = modular.trained(near, settings, 1, cache=tmp_path)
    assert (folder, record["steps"]) == (orders[4].folder, 10)
    with held(orders[0].lock):  # another process is at it
        modular.train_stacks([*orders, *orders], device="cpu")
    assert stacks == [(PLUS.width, 1), (PLUS.width, 2), (wide.width, 2)]
    assert [order.record.is_file() for order in orders] == [False, True, True, True, True, True]
    modular.train_stacks(orders, device="cpu")
    assert stacks[3:] == [(PLUS.width, 1)]


def test_processes_that_claim_at_once_do_not_tear_stacks_apart(tmp_path, monkeypatch):
    settings = replace(TINY, training=replace(TINY.training, steps=10))
    orders = [modular.Order(PLUS, settings, seed, tmp_path) for seed in range(4)]
    begun, stacks = Barrier(2), []

    @contextmanager
    def slowly(path, *, wait=True):
        with held(path, wait=wait) as mine:
            time.sleep(0.02)
            yield mine

    def claim(_):
        begun.wait()
        modular.train_stacks(orders, device="cpu")

    monkeypatch.setattr(modular, "held", slowly)
    monkeypatch.setattr(modular, "_train", lambda orders, *_: (time.sleep(0.5), stacks.append(len(orders))))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(claim, range(2)))
    assert stacks == [4]


def test_step_val_acc_99_counts_updates_or_says_that_it_never_came():
    split = SMALL.split("x_plus_y", 0, 0.8)
    spec, _ = weights_of(PLUS)
    never = trained(spec, split.train, split.validation, replace(TINY.training, steps=20), 0)
    assert never.step_val_acc_99 == 20
    seen = trained(spec, split.train, split.train, TINY.training, 0)  # validated on what it is trained on
    assert seen.step_val_acc_99 % 10 == 0
    assert seen.step_val_acc_99 < 200
    assert seen.best_val_acc >= 0.999
    assert seen.steps <= seen.best_step + 100


def test_distillation_never_ends_below_its_start():
    spec, start = weights_of(PLUS)
    rows = SMALL.rows("x_plus_y")
    noise = torch.randn(len(rows), spec.vocab, generator=torch.Generator().manual_seed(1))
    before = answers.measure(spec, start, rows)[0].float().mean()
    done = distil(spec, start, {"x": Lesson(rows, noise)}, {"x": rows}, Distil(steps=4, lrs=(1e-2, 1.0), every=2), 0)
    assert answers.measure(spec, done.weights, rows)[0].float().mean() >= before
    assert done.curve[0]["step"] == 0
    assert sorted(done.trials) == ["0.01", "1"]


# ---------------------------------------------------------------------- rows


def row(**changes):
    made = Row("modular", "quick", "same/x_plus_y/all", 0, "fold", scores={"x_plus_y": 0.9}, owners={"x_plus_y": 1.0})
    return replace(made, **changes)


def test_a_half_written_line_is_ignored_and_cut_off(tmp_path):
    store = Store(tmp_path)
    store.append(row())
    whole = store.path.read_bytes()
    for cut in (1, 30, len(whole) - 1):
        store.path.write_bytes(whole + whole[:cut])
        assert [r.method for r in store.read()] == ["fold"]
        store.append(row(method="union"))
        assert store.path.read_bytes().count(b"\n") == 2
        assert store.keys() == {row().key, row(method="union").key}
    store.path.write_bytes(b'{"suite": ')
    assert store.read() == []
    store.append(row())
    assert store.path.read_bytes() == whole


def test_a_whole_line_that_is_no_row_is_named(tmp_path):
    store = Store(tmp_path)
    store.append(row())
    store.path.write_bytes(store.path.read_bytes() + b"{}\n")
    with pytest.raises(OutputError, match=r"rows\.jsonl:2"):
        store.read()


def test_rows_come_back_equal_and_infinity_becomes_null(tmp_path):
    store, told = Store(tmp_path), row(extra={"curve": [{"step": 0}], "worst": float("inf")})
    store.append(told)
    assert store.read() == [replace(told, extra={"curve": [{"step": 0}], "worst": None})]


def test_worst_skill_and_gap():
    owners, anchor = {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.2}
    found = summarise({"a": 0.9, "b": 0.6}, owners, anchor, "accuracy")
    assert (found["worst"], found["worst_skill"]) == (0.6, "b")
    assert found["gap_closed"] == pytest.approx(0.5)
    found = summarise({"a": 2.1, "b": 2.0}, {"a": 2.0, "b": 1.5}, {"a": 2.0, "b": 3.5}, "bits per byte")
    assert (found["worst"], found["worst_skill"]) == (2.0, "b")
    assert found["gap_closed"] == pytest.approx(0.75)
    for metric in ("accuracy", "bits per byte"):
        for scores in ({"a": math.nan, "b": 0.5}, {"b": 0.5, "a": math.nan}):
            assert summarise(scores, owners, anchor, metric)["worst_skill"] == "a"
            far = dict.fromkeys("ab", 0.0 if metric == "accuracy" else 9.0)
            assert math.isnan(summarise(scores, owners, far, metric)["gap_closed"])


def test_the_leaderboard_depends_on_the_rows_only_and_says_who_wins():
    protocol = {"setting": {"protocol": "cross"}, "case": "cross/a+b/all/sum", "owners": {"a": 1.0, "b": 1.0}}
    rows = [
        row(method=m, seed=seed, worst=w, worst_skill="b", scores={"a": 1.0, "b": w}, **protocol)
        for m, w in (("fold", 0.9), ("fold_heal", 0.95), ("ot_fusion", 0.97), ("ensemble", 0.99))
        for seed in (0, 1)
    ]
    rows.append(row(method="linear", status="cannot", reason="too | wide", scores={}, **protocol))
    page = board.write(rows)
    assert page == board.write(rows[::-1])
    assert "cross/a+b/all/sum: ot_fusion 0.9700 (ours 0.9500)" in page
    assert "cannot: too \\| wide" in page
    assert page.index("does not win") < page.index("## Modular")


# ---------------------------------------------------------------------- methods


def test_a_method_without_a_known_score_is_last_in_its_table():
    case = {"suite": "text", "case": "a+b/sum", "metric": "bits per byte", "owners": {"a": 1.0, "b": 1.0}}
    kept = row(method="fold", worst=1.4, worst_skill="b", scores={"a": 1.0, "b": 1.4}, **case)
    lost = row(method="ot_fusion", worst=None, worst_skill=None, scores={"a": 1.0, "b": None}, **case)
    [table] = board._per_case([lost, kept])
    assert [line[0] for line in table.lines] == [board.name_of("fold"), board.name_of("ot_fusion")]


def test_rivals_are_found_in_the_folder_and_unknown_names_are_refused():
    assert "linear" in methods.rivals()
    assert "linear" in methods.known()
    assert methods.chosen(["fold", "anchor"]) == ["fold", "anchor"]
    with pytest.raises(PolymergeError, match="did you mean 'fold'"):
        methods.chosen(["fodl"])


def test_a_shape_that_holds_the_experts_keeps_to_the_budget():
    from polymerge import families, plan

    small, large, family = modular.spec_of(PLUS, SMALL), modular.spec_of(MINUS, SMALL), families.get("mistral")
    target = replace(large, width=32, heads=6, kv_heads=6, mlp=300)
    found = methods.holding(family, [small, large], target)
    assert (found.width, found.layers) == (48, 2)
    assert found.mlp >= large.mlp
    assert plan.parameters(family, found) <= plan.parameters(family, target)


def test_without_room_a_method_gets_the_least_shape_that_holds_the_experts_and_the_row_says_so():
    from polymerge import families, plan

    small, large, family = modular.spec_of(PLUS, SMALL), modular.spec_of(MINUS, SMALL), families.get("mistral")
    target = replace(large, width=32, heads=2, kv_heads=2, mlp=8)
    tried = []

    def make(spec):
        tried.append(spec)
        if len(tried) == 1:
            raise PreflightError("too narrow")
        return {None: {}}

    found, _, note = methods.fitting(make, target, [small, large], family)
    assert tried == [target, found]
    assert (found.width, found.layers, found.heads, found.mlp) == (48, 2, 3, large.mlp)
    assert note.startswith(f"given {plan.parameters(family, found):,} parameters, more than the fold's")
    with pytest.raises(PreflightError, match="never"):
        methods.fitting(lambda _: refuse("never"), target, [small, large], family)
    with pytest.raises(PreflightError, match="never"):
        methods.fitting(lambda _: refuse("never"), large, [small], family)


def test_the_least_shape_is_one_that_the_family_accepts():
    """A Llama's heads divide its width: 3 heads and width 32 make it 33."""
    from polymerge import families

    small, large = modular.spec_of(PLUS, SMALL), replace(modular.spec_of(MINUS, SMALL), width=32)
    found = methods.holding(families.get("llama"), [small, large], replace(small, mlp=8))
    assert (found.width, found.heads) == (33, 3)


def refuse(why):
    raise PreflightError(why)


def test_a_rivals_settings_are_chosen_by_the_worst_skill_on_validation():
    class Bed:
        def __init__(self, metric):
            self.metric, self.budget, self.bases = metric, "sum", ()
            self.owners = self.anchor_scores = self.expert_parameters = self.setting = self.shared = self.tries = {}

        def rival(self, method):
            held = {"a": 1.0, "b": method.knob}
            spent = {"flops": 7, "reused_flops": 50, "reused": (2.0, 3.0)}
            return methods.Outcome({"a": method.knob}, notes="shape", extra={"validation": held}, **spent)

        def peer(self, name, scale=1.0):
            assert name.startswith("mergekit")
            return methods.Outcome({"a": scale}, extra={"validation": {"a": -abs(scale - 0.6)}})

    class Method:
        GRID = ({}, {"knob": 0.7}, {"knob": 0.1})

        def __init__(self, knob=0.5):
            self.knob = knob

    found = methods.tuned(Bed("accuracy"), Method)
    assert (found.scores, found.notes) == ({"a": 0.7}, "knob 0.7; best of 3 by validation; shape")
    assert (found.flops, found.reused_flops, found.reused) == (3 * 7, 50, (2.0, 3.0))  # what is shared is taken once
    Method.GRID = ({"knob": 2.0}, {"knob": 1.5}, {"knob": 3.0})
    assert methods.tuned(Bed("bits per byte"), Method).scores == {"a": 1.5}
    assert "best of 2 by validation" in methods.tuned(Bed("bits per byte"), Method, 2).notes
    Method.GRID = ({"knob": math.nan}, {"knob": 2.0}, {"knob": math.nan})
    assert methods.tuned(Bed("bits per byte"), Method).scores == {"a": 2.0}
    Method.grid = staticmethod(lambda experts: ({"knob": 0.1 + experts},))
    assert methods.tuned(Bed("accuracy"), Method).scores == {"a": 0.1}
    assert [len(methods.rivals()["linear"].grid(n)) for n in (1, 2, 3)] == [1, 3, 1]
    ties = methods.run(Bed("accuracy"), "mergekit_ties")
    assert (ties.scores, ties.notes) == ({"a": 0.7}, "weight 1 each, density 0.5, scale 0.7; best of 3 by validation")
    assert methods.run(Bed("accuracy"), "mergekit_linear").notes == "equal weights"


def test_every_listed_case_of_the_full_profile_is_there():
    names = [case.name for case in modular.cases("full")]
    assert len(names) == len(set(names))
    assert sum(name.startswith("same/") for name in names) == 32
    assert sum(name.startswith("cross/") for name in names) == 6 * 4 * 3 + 3
    assert sum(name.startswith("baseline/") for name in names) == 20


def test_only_the_four_tasks_leave_the_width_to_the_fold(tmp_path):
    cases = [case for case in modular.cases("full") if case.protocol == "cross"]
    assert all(case.detail.free == (len(case.detail.experts) > 2) for case in cases)
    detail = modular.Detail((PLUS, MINUS))
    widths = {
        free: [s.width for s in ModularBed(
            Case("cross", "cross", replace(detail, free=free)), 0, TINY, tmp_path, cache=tmp_path / "cache"
        ).shapes()]
        for free in (False, True)
    }  # fmt: skip
    assert widths[False] == [MINUS.width]
    assert len(widths[True]) > 1


# ---------------------------------------------------------------------- a whole run


@pytest.fixture
def tiny(monkeypatch, tmp_path, trained_once):
    monkeypatch.setenv("POLYMERGE_CACHE", str(trained_once))
    monkeypatch.setitem(modular.PROFILES, "quick", TINY)
    cases = [
        Case("baseline/plus", "baseline", modular.Detail((PLUS,), run=0), ("expert",)),
        Case("cross/plus+minus", "cross", modular.Detail((PLUS, MINUS))),
    ]
    monkeypatch.setattr(modular, "cases", lambda _profile: cases)
    return tmp_path / "out"


class Told:
    """A listener that keeps [cells announced, cells left]."""

    def stage(self, _name, total):
        self.cells = [total, total]

    def advance(self, _note, n=1):
        self.cells[1] -= n


def test_a_rate_that_a_graph_reads_is_set_where_it_is():
    weight = torch.ones(2, requires_grad=True)
    for rate in (torch.tensor(1.0), 1.0):
        optimiser = torch.optim.SGD([weight], lr=rate)
        set_rate(optimiser, 0.25)
        assert float(optimiser.param_groups[0]["lr"]) == 0.25
        assert not isinstance(rate, torch.Tensor) or float(rate) == 0.25


WANTED = ["expert", "fold", "fold_heal", "anchor_distill", "union", "placebo", "linear"]
WANTED += ["mergekit_ties", "fuse_distill", "task_vector_transport", "anchor_distill_more", "fold_heal_more"]


def test_a_run_fills_every_cell_and_a_second_one_repeats_none(tiny, monkeypatch):
    told = Told()
    rows = bench.run("modular", "quick", tiny, WANTED, device="cpu", progress=told)
    assert told.cells == [len(WANTED), 0]
    assert sorted(r.method for r in rows) == sorted(WANTED)
    assert all(r.status == "ok" or r.reason for r in rows)
    fold, healed, expert = (next(r for r in rows if r.method == m) for m in ("fold", "fold_heal", "expert"))
    assert expert.flops == 6 * expert.parameters * expert.tokens
    read = {t: 3 * len(SMALL.split(t, 0, 0.8).train) for t in healed.scores}
    teachers = [2 * healed.expert_parameters[p.name] * read[p.task] for p in (PLUS, MINUS)]
    assert healed.flops == fold.flops + 6 * healed.parameters * healed.tokens + sum(teachers)
    every = 2 * sum(healed.expert_parameters.values()) * sum(read.values())  # experts whose predictions are fused
    for method, reads in (("anchor_distill", sum(teachers)), ("fuse_distill", every)):
        found = next(r for r in rows if r.method == method)
        assert found.flops == 6 * found.parameters * found.tokens + reads
    for name in ("anchor_distill_more", "fold_heal_more"):
        [more] = [r for r in rows if r.method == name]
        assert more.flops == pytest.approx(healed.flops, rel=0.2)  # whole steps, another shape
        assert more.steps > healed.steps
    assert next(r for r in rows if r.method == "fuse_distill").scores.keys() == fold.scores.keys()
    [transport] = [r for r in rows if r.method == "task_vector_transport"]
    assert "needs the donor's base model" in transport.reason
    assert set(fold.scores) == {"x_plus_y", "x_minus_y"}
    assert fold.parameters <= sum(fold.expert_parameters.values())
    assert fold.worst == fold.scores[fold.worst_skill]
    assert (tiny / "LEADERBOARD.md").read_text() == board.write(rows)
    lines = Store(tiny).path.read_bytes()
    monkeypatch.setattr(modular, "together", lambda *_, **__: pytest.fail("an expert is trained again"))
    assert bench.run("modular", "quick", tiny, WANTED, device="cpu") == rows
    assert Store(tiny).path.read_bytes() == lines


def test_a_lost_row_alone_is_run_again(tiny):
    rows = bench.run("modular", "quick", tiny, ["union", "anchor"], device="cpu")
    store = Store(tiny)
    kept = [line for line in store.path.read_bytes().splitlines(keepends=True) if b'"method": "anchor"' in line]
    store.path.write_bytes(b"".join(kept) + b'{"suite": "modu')
    again = bench.run("modular", "quick", tiny, ["union", "anchor"], device="cpu")
    assert [r.scores for r in again] == [r.scores for r in rows]
    assert store.path.read_bytes().count(b"\n") == 2


def test_a_case_that_another_process_is_at_is_helped_with(tiny):
    with held(cells.claim(tiny, "modular", "quick", "cross/plus+minus", 0)):
        rows = bench.run("modular", "quick", tiny, ["union", "anchor"], device="cpu")
    assert {r.method for r in rows} == {"union", "anchor"}
    written = [json.loads(line)["method"] for line in Store(tiny).path.read_text().splitlines()]
    assert written == ["anchor", "union"]  # the owner of the case begins at the other end


def test_a_method_that_another_process_is_at_is_waited_for(tiny):
    def other():
        with held(cells.claim(tiny, "modular", "quick", "cross/plus+minus", 0, "anchor")):
            time.sleep(1)
            Store(tiny).append(row(case="cross/plus+minus", method="anchor", scores={"x_plus_y": 0.5}))

    bench.run("modular", "quick", tiny, ["union"], device="cpu")
    thread = threading.Thread(target=other)
    thread.start()
    time.sleep(0.3)
    rows = bench.run("modular", "quick", tiny, ["anchor"], device="cpu")
    thread.join()
    assert [r.scores for r in rows if r.method == "anchor"] == [{"x_plus_y": 0.5}]
    assert Store(tiny).path.read_bytes().count(b"\n") == 2


def test_what_a_method_cannot_do_is_a_row_with_the_reason(tiny, monkeypatch):
    def refuse(_bed):
        raise PreflightError("this does not fit")

    from polymerge.bench.modular_bed import ModularBed

    monkeypatch.setattr(ModularBed, "union", refuse)
    [found] = bench.run("modular", "quick", tiny, ["union"], device="cpu")
    assert (found.status, found.reason, found.scores) == ("cannot", "this does not fit", {})
    assert "cannot: this does not fit" in (tiny / "LEADERBOARD.md").read_text()


def test_a_bug_in_one_method_costs_no_other_row(tiny, monkeypatch):
    from polymerge.bench.modular_bed import ModularBed

    monkeypatch.setattr(ModularBed, "union", lambda _bed: 1 / 0)
    with pytest.raises(PolymergeError, match=r"1 of the cells have no row; .* union: ZeroDivisionError"):
        bench.run("modular", "quick", tiny, ["union", "anchor"], device="cpu")
    assert [r.method for r in Store(tiny).read()] == ["anchor"]
    assert "anchor alone" in (tiny / "LEADERBOARD.md").read_text()


def test_reasons_name_no_folder_of_this_machine():
    said = machine.without_folders("/home/me/cache/model-1: width 3/4 at 'sub/x' and (/tmp/a/b.txt) on a/c")
    assert said == "model-1: width 3/4 at 'sub/x' and (b.txt) on a/c"


def test_unknown_names_are_refused_before_anything_runs(tiny):
    for words in (("modlar", "quick"), ("modular", "fast")):
        with pytest.raises(PolymergeError, match="suites: modular, text"):
            bench.run(*words, tiny)
    with pytest.raises(PolymergeError, match="no case 'x'"):
        bench.run("modular", "quick", tiny, cases=["x"])
    assert not tiny.exists()
    with pytest.raises(OutputError, match="does not exist"):
        bench.report(tiny)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from polymerge.bench import modular, rows, runner
from test_bench import MINUS, PLUS, TINY
from polymerge.bench.methods import Case
modular.PROFILES["quick"] = TINY
modular.cases = lambda profile: [Case("cross/plus+minus", "cross", modular.Detail((PLUS, MINUS)))]
real, count = rows.Store.append, []
def append(store, row):
    count.append(row)
    if len(count) == 3:
        with store.path.open("ab") as file:
            file.write(b'{{"suite": "modular", "met')
        os.kill(os.getpid(), signal.SIGKILL)
    real(store, row)
if len(sys.argv) > 2:
    rows.Store.append = append
runner.run("modular", "quick", sys.argv[1], ["union", "anchor", "best_expert", "ensemble"], device="cpu")
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    here = Path(__file__).parent
    script = KILLED.format(tests=str(here))
    environment = {**os.environ, "POLYMERGE_CACHE": str(tmp_path / "cache")}
    out = tmp_path / "out"
    first = subprocess.run([sys.executable, "-c", script, str(out), "kill"], env=environment, cwd=here, check=False)
    assert first.returncode == -signal.SIGKILL
    kept = Store(out).path.read_bytes()
    assert kept.endswith(b'"met')
    subprocess.run([sys.executable, "-c", script, str(out)], env=environment, cwd=here, check=True)
    lines = Store(out).path.read_bytes()
    assert lines.startswith(kept[: kept.rindex(b"\n") + 1])
    found = [json.loads(line)["method"] for line in lines.splitlines()]
    assert sorted(found) == ["anchor", "best_expert", "ensemble", "union"]


SHARED = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from polymerge.bench import modular, runner
from polymerge.bench.modular_bed import ModularBed
from polymerge.bench.methods import Case
from test_bench import MINUS, PLUS, TINY
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &
modular.PROFILES["quick"] = TINY
modular.cases = lambda profile: [Case("cross/plus+minus", "cross", modular.Detail((PLUS, MINUS)))]
def endless(bed):
    Path(sys.argv[1] + f".at-{{os.getpid()}}").touch()
    time.sleep(600)
if len(sys.argv) > 2:
    ModularBed.union = ModularBed.anchor = endless
if __name__ == "__main__":
    runner.run("modular", "quick", sys.argv[1], ["union", "anchor"], device="cpu", workers=2)
"""


def test_two_workers_share_a_case_and_an_interrupt_ends_both_quietly(tmp_path):
    here, script, out = Path(__file__).parent, tmp_path / "run.py", tmp_path / "out"
    script.write_text(SHARED.format(tests=str(here)))
    environment = {**os.environ, "POLYMERGE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(script), str(out)]
    run = subprocess.Popen(
        [*command, "wait"], env=environment, cwd=here, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("out.at-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said = run.communicate(timeout=120)[1]
    assert len(list(tmp_path.glob("out.at-*"))) == 2
    assert said.count("KeyboardInterrupt\n") == 1, said
    assert "SpawnProcess" not in said
    subprocess.run(command, env=environment, cwd=here, check=True)
    found = [json.loads(line)["method"] for line in Store(out).path.read_bytes().splitlines()]
    assert sorted(found) == ["anchor", "union"]
