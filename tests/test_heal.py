"""Healing: never worse than it began, the same bytes after an interruption, and clear refusals."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BYTES, TINY
from transformers import AutoConfig, AutoModelForCausalLM

from polymerge import divergence, heal_run
from polymerge.calibrate.texts import Rows
from polymerge.divergence import kl
from polymerge.errors import OutputError, RecipeError
from polymerge.evaluate import bits_per_byte
from polymerge.heal import Heal, heal
from polymerge.heal_state import LOG, STATE
from polymerge.methods.union import UnionForCausalLM
from polymerge.teachers import Batches, next_token, resolve

FAST = Heal(tokens=40 * 6 * 16, lr=3e-3, batch_rows=6, length=16, evaluate_every=5, precision="float32")


def model(seed, family="llama", **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": BYTES,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": BYTES - 1,
        "initializer_range": 0.2,
        **TINY[family],
        **changes,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


def text(seed, start, count):
    """Rows of the bytes from `start` on: two skills that share no token."""
    generator = torch.Generator().manual_seed(seed)
    return Rows(start + torch.randint(0, 64, (count, FAST.length), generator=generator), count * (FAST.length - 1))


@pytest.fixture
def case():
    """(student, teachers, rows, validation): teachers of two families, the student a random model."""
    teachers = {"low": model(1), "high": model(2, "gpt2")}
    rows = {"low": text(1, 0, 24), "high": text(2, 100, 17)}
    validation = {"low": text(3, 0, 8), "high": text(4, 100, 8)}
    return model(5), teachers, rows, validation


def weights(student):
    return {name: p.detach().clone() for name, p in student.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def mean_kl(student, teachers, rows):
    with torch.no_grad():
        return {
            name: float(kl(student(r.tokens).logits, teachers[name](r.tokens).logits).mean())
            for name, r in rows.items()
        }


@pytest.mark.parametrize("chunk", [1, 40, 2**18])
def test_kl_and_its_gradient_are_those_of_autograd(chunk, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_CPU", chunk)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 5, 11, generator=generator)
    ours = kl(student, teacher)
    weight = torch.rand(3, 5, generator=generator)
    (gradient,) = torch.autograd.grad((weight * ours).sum(), student)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1)
    (expected,) = torch.autograd.grad((weight * plain).sum(), student)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected)


def test_kl_of_a_longer_vocabulary_counts_its_padding_against_the_student():
    student, teacher = torch.zeros(1, 1, 4, requires_grad=True), torch.zeros(1, 1, 2)
    loss = kl(student, teacher)
    assert loss.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([-0.25, -0.25, 0.25, 0.25]))
    assert float(kl(teacher, torch.zeros(1, 1, 4))) == pytest.approx(0)


def test_batches_are_balanced_passes_without_replacement():
    batches = Batches({"a": 6, "b": 3}, 5, torch.Generator().manual_seed(0))
    drawn = [batches.draw() for _ in range(12)]
    for name, size in (("a", 6), ("b", 3)):
        order = torch.cat([d[name] for d in drawn])
        assert len(order) == 30
        for one_pass in order.split(size):
            assert len(set(one_pass.tolist())) == len(one_pass)


def test_batches_go_on_from_a_state():
    batches = Batches({"a": 7, "b": 3}, 4, torch.Generator().manual_seed(0))
    batches.draw()
    state = batches.state()
    expected = [batches.draw() for _ in range(5)]
    other = Batches({"a": 7, "b": 3}, 4, torch.Generator().manual_seed(9))
    other.load(state)
    for want, got in zip(expected, [other.draw() for _ in range(5)], strict=True):
        assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("teacher", ["owner", "union"])
def test_comes_nearer_to_every_teacher(case, teacher):
    student, teachers, rows, validation = case
    before = mean_kl(student, teachers, validation)
    result = heal(student, teachers, rows, validation, replace(FAST, teacher=teacher))
    after = mean_kl(student, teachers, validation)
    assert all(after[name] < 0.8 * before[name] for name in before)
    assert result.curve[-1].loss < 0.8 * result.curve[1].loss
    assert (result.steps, result.tokens, result.stopped_early) == (40, 40 * 6 * 16, False)


def test_takes_a_union_model_as_the_teacher(case):
    student, teachers, rows, validation = case
    union = UnionForCausalLM.from_experts(list(teachers.values()))
    result = heal(student, union, rows, validation, replace(FAST, teacher="union", tokens=960))
    assert result.reference == {name: bits_per_byte(union, validation[name]) for name in validation}


def test_reports_the_state_that_the_student_holds(case):
    student, teachers, rows, validation = case
    result = heal(student, teachers, rows, validation, FAST)
    assert result.after == {name: bits_per_byte(student, validation[name]) for name in validation}
    assert result.reference == {name: bits_per_byte(teachers[name], validation[name]) for name in validation}
    best = min(result.curve, key=lambda p: p.worst)
    assert (best.step, best.validation) == (result.best_step, result.after)
    assert best.worst == max(result.after[n] - result.reference[n] for n in result.after)
    assert not student.training
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_never_worse_than_the_start_even_with_an_absurd_learning_rate(case, precision):
    _, teachers, rows, validation = case
    student = model(1)  # "low" itself: every step can only lose what it knows
    result = heal(student, teachers, rows, validation, replace(FAST, lr=10.0, precision=precision))
    worst = max(bits_per_byte(student, validation[n]) - result.reference[n] for n in validation)
    assert worst <= result.curve[0].worst
    assert [p.event for p in result.curve].count("back-off") >= 2


def test_keeps_the_start_when_nothing_is_better(case):
    _, teachers, rows, validation = case
    student, start = model(1), weights(model(1))
    result = heal(
        student,
        {"low": teachers["low"]},
        {"low": rows["low"]},
        {"low": validation["low"]},
        replace(FAST, lr=10.0),
    )
    assert result.best_step == 0
    assert same(weights(student), start)


def test_twice_gives_the_same_bytes(case):
    student, teachers, rows, validation = case
    heal(student, teachers, rows, validation, FAST, seed=3)
    again = model(5)
    heal(again, teachers, rows, validation, FAST, seed=3)
    assert same(weights(student), weights(again))
    other = model(5)
    heal(other, teachers, rows, validation, FAST, seed=4)
    assert not same(weights(student), weights(other))


class Interrupt:
    """Ctrl-C in the `at`-th forward pass of a model."""

    def __init__(self, at):
        self.left = at

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 2, 3, 9, 17, 28])
def test_interrupted_and_resumed_gives_the_same_bytes(case, tmp_path, at):
    student, teachers, rows, validation = case
    settings = replace(FAST, lr=3e-2, tokens=20 * 6 * 16, batch_rows=5)  # back-offs and remainders are crossed too
    whole = heal(student, teachers, rows, validation, settings, out=tmp_path / "whole")
    parts, folder = model(5), tmp_path / "parts"
    handle = parts.register_forward_pre_hook(Interrupt(at))
    with pytest.raises(KeyboardInterrupt):
        heal(parts, teachers, rows, validation, settings, out=folder)
    handle.remove()
    parts = model(5)
    resumed = heal(parts, teachers, rows, validation, settings, out=folder)
    assert same(weights(student), weights(parts))
    strip = [replace(p, seconds=0.0) for p in whole.curve]
    assert [replace(p, seconds=0.0) for p in resumed.curve] == strip
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [p.step for p in whole.curve]


def test_the_default_rate_is_that_of_the_start_after_an_interruption_too(case, tmp_path, monkeypatch):
    student, teachers, rows, validation = case
    monkeypatch.setattr("polymerge.heal._FAR", 1e-3)
    settings = replace(FAST, lr=None)
    handle = student.register_forward_pre_hook(Interrupt(30))
    with pytest.raises(KeyboardInterrupt):
        heal(student, teachers, rows, validation, settings, out=tmp_path)
    handle.remove()
    done = heal(model(5), teachers, rows, validation, settings, out=tmp_path)
    assert done.lr == settings.peak(done.curve[0].worst) > settings.peak(0.0)
    assert done.curve[-1].lr == pytest.approx(done.lr * settings.rate(39))


def test_periodic_saves_are_enough_to_resume(case, tmp_path, monkeypatch):
    student, teachers, rows, validation = case
    heal(student, teachers, rows, validation, FAST)
    monkeypatch.setattr(heal_run, "_SAVE_SECONDS", 0.0)

    class KilledError(Exception):
        pass

    def die(step, _steps, _text):
        if step == 13:
            raise KilledError

    with pytest.raises(KilledError):
        heal(model(5), teachers, rows, validation, FAST, out=tmp_path, progress=die)
    seen = []
    parts = model(5)
    heal(parts, teachers, rows, validation, FAST, out=tmp_path, progress=lambda *a: seen.append(a[0]))
    assert 1 < seen[0] <= 13
    assert same(weights(student), weights(parts))


def test_a_half_made_step_is_never_saved(case, tmp_path, monkeypatch):
    student, teachers, rows, validation = case
    heal(student, teachers, rows, validation, FAST)
    real, calls = torch.optim.AdamW.step, [0]

    def step(self):
        real(self)
        calls[0] += 1
        if calls[0] == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(heal_run, "_SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            heal(model(5), teachers, rows, validation, FAST, out=tmp_path)
    assert torch.load(tmp_path / STATE)["step"] < 8
    parts = model(5)
    heal(parts, teachers, rows, validation, FAST, out=tmp_path)
    assert same(weights(student), weights(parts))


def test_a_finished_run_is_not_run_again(case, tmp_path):
    student, teachers, rows, validation = case
    first = heal(student, teachers, rows, validation, FAST, out=tmp_path)
    again, steps = model(5), []
    second = heal(again, teachers, rows, validation, FAST, out=tmp_path, progress=lambda *a: steps.append(a))
    assert not steps
    assert second.after == first.after
    assert same(weights(student), weights(again))


def test_log_is_well_formed(case, tmp_path):
    student, teachers, rows, validation = case
    result = heal(student, teachers, rows, validation, FAST, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, *range(5, 41, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [LOG, STATE]
    for line, point in zip(lines, result.curve, strict=True):
        assert line["tokens"] == line["step"] * 96
        assert line["validation"] == point.validation
        assert line["best"] == point.best
        assert set(line) >= {"loss", "lr", "worst", "seconds", "event"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": replace(FAST, lr=1e-3)}, "heal.lr"),
        ({"seed": 1}, "seed"),
        ({"student": 6}, "student"),
        ({"rows": 9}, "text low"),
        ({"guide": 7}, "guide high"),
    ],
)
def test_the_state_of_other_inputs_is_refused(case, tmp_path, change, named):
    student, teachers, rows, validation = case
    heal(student, teachers, rows, validation, FAST, out=tmp_path)
    before = (tmp_path / STATE).read_bytes()
    if "rows" in change:
        rows = {**rows, "low": text(change["rows"], 0, 24)}
    with pytest.raises(OutputError, match=rf"another {named} \(.*delete {tmp_path}"):
        heal(
            model(change.get("student", 5)), teachers, rows, validation, change.get("settings", FAST),
            out=tmp_path, seed=change.get("seed", 0), guide=model(change["guide"]) if "guide" in change else None,
        )  # fmt: skip
    assert (tmp_path / STATE).read_bytes() == before


def test_a_damaged_state_is_refused(case, tmp_path):
    student, teachers, rows, validation = case
    heal(student, teachers, rows, validation, FAST, out=tmp_path)
    whole = (tmp_path / STATE).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"nonsense"):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(OutputError, match=rf"damaged; delete {tmp_path}"):
            heal(model(5), teachers, rows, validation, FAST, out=tmp_path)


def test_an_expert_that_owns_two_skills_is_one_of_a_union(case):
    teachers = case[1]
    given = {"low": teachers["low"], "also": teachers["low"], "high": teachers["high"]}
    guides, _ = resolve(given, "union", tuple(given))
    assert len(guides["low"].config.experts) == 2


def test_an_output_that_is_a_file_is_refused(case, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another folder"):
        heal(*case, FAST, out=tmp_path / "file")


def poison(teacher, first, last):
    """Make a model's logits NaN in its calls first..last."""
    calls = [0]

    def hook(_module, _args, output):
        calls[0] += 1
        if first <= calls[0] <= last:
            output.logits.fill_(torch.nan)
        return output

    teacher.register_forward_hook(hook)


def test_a_loss_that_is_not_finite_goes_back_and_halves_the_rate(case):
    student, teachers, rows, validation = case
    poison(teachers["low"], 4, 4)
    result = heal(student, teachers, rows, validation, FAST)
    assert not result.stopped_early
    assert [p.event for p in result.curve if p.event] == ["loss not finite"]
    assert result.curve[-1].lr == pytest.approx(FAST.lr * FAST.rate(39) / 2)
    assert result.best_step > 5
    assert all(p.isfinite().all() for p in student.parameters())


def test_gives_up_after_three_losses_that_are_not_finite(case, tmp_path):
    student, teachers, rows, validation = case
    start = weights(student)
    poison(teachers["low"], 2, 10**9)
    result = heal(student, teachers, rows, validation, FAST, out=tmp_path)
    assert (result.stopped_early, result.steps, result.best_step) == (True, 3, 0)
    assert "not finite 3 times" in result.warning
    assert same(weights(student), start)


def test_a_measure_that_is_not_finite_is_null_in_the_log_and_never_the_best(case, tmp_path):
    student, teachers, rows, validation = case
    poison(student, 1, 10**9)
    result = heal(student, teachers, rows, validation, FAST, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert lines[0]["worst"] is None
    assert result.stopped_early


def test_bfloat16_heals_as_far(case):
    student, teachers, rows, validation = case
    attention = student.config._attn_implementation
    wide = heal(student, teachers, rows, validation, FAST)
    narrow = heal(model(5), teachers, rows, validation, replace(FAST, precision="bfloat16"))
    assert narrow.curve[-1].worst == pytest.approx(wide.curve[-1].worst, abs=0.05)
    assert student.config._attn_implementation == attention


def check(key, value):
    """Past beartype, which in tests would refuse a wrong word first."""
    settings = Heal()
    object.__setattr__(settings, key, value)
    settings.__post_init__()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", 1000), ("lr", 0.0), ("lr", -1.0), ("lr", math.inf), ("lr", math.nan), ("warmup", 1.0),
        ("batch_rows", 0), ("length", 1), ("evaluate_every", 0), ("teacher", "ensemble"),
        ("precision", "int8"), ("across", "bytes"), ("text", 1.5), ("text", -0.1), ("features", -1.0),
        ("features", math.inf),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(RecipeError, match=rf"heal\.{key} is .*expected"):
        check(key, value)


def test_rate_rises_and_falls_to_nearly_nothing():
    settings = Heal(tokens=100 * 2048, warmup=0.1)
    rates = [settings.rate(step) for step in range(settings.steps)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1
    assert rates[-1] < 0.02


def test_the_weight_of_states_falls_to_nothing_in_a_long_run():
    settings = Heal(tokens=1_600_000, features=3.0)
    assert settings.weight(0) == 3.0
    assert settings.weight(settings.steps // 4) == pytest.approx(1.5, abs=0.01)
    assert settings.weight(settings.steps // 2 + 1) == settings.weight(settings.steps) == 0
    assert (short := replace(settings, tokens=400_000)).weight(short.steps) == pytest.approx(1.5, abs=0.01)


def test_a_longer_run_takes_larger_steps():
    peaks = [Heal(tokens=tokens).peak(0.1) for tokens in (100_000, 400_000, 1_600_000, 10**8)]
    assert peaks == pytest.approx([5e-4, 1e-3, 2e-3, 4e-3])
    assert Heal(tokens=100_000, lr=0.1).peak(0.1) == 0.1


def test_a_start_far_behind_takes_larger_steps():
    peaks = [Heal(tokens=400_000).peak(behind) for behind in (-0.1, 0.2, 0.4, 5.0, math.inf)]
    assert peaks == pytest.approx([1e-3, 1e-3, 2e-3, 4e-3, 4e-3])
    assert Heal(lr=0.1).peak(5.0) == 0.1


@pytest.mark.parametrize(("lost", "events"), [(0.09, 0), (0.11, 1)])
def test_only_what_is_clearly_lost_is_taken_back(case, monkeypatch, lost, events):
    student, teachers, rows, validation = case
    measured = iter([1.0] * (2 * len(rows)) + [1.0 + lost] * 1000)  # the owners, the start, then what was lost
    monkeypatch.setattr(heal_run, "bits_per_byte", lambda *_: next(measured))
    result = heal(student, teachers, rows, validation, replace(FAST, tokens=6 * 96, evaluate_every=2))
    assert [p.event for p in result.curve].count("back-off") == events


def test_measuring_takes_a_small_share():
    settings = Heal(tokens=400_000)
    assert settings.interval(1000) == 25
    every = settings.interval(100_000)
    assert 0.15 * 3 * every * 2048 >= 100_000
    assert replace(settings, evaluate_every=7).interval(10**9) == 7


def test_skills_and_rows_must_fit(case):
    student, teachers, rows, validation = case
    with pytest.raises(ValueError, match="no teacher for skill 'low'"):
        heal(student, {"high": teachers["high"]}, rows, validation, FAST)
    with pytest.raises(ValueError, match="expected the same"):
        heal(student, teachers, rows, {"low": validation["low"]}, FAST)
    with pytest.raises(RecipeError, match=r"heal\.length is 8"):
        heal(student, teachers, rows, validation, replace(FAST, length=8))
    with pytest.raises(ValueError, match="'owner', but the teacher is a union"):
        heal(student, UnionForCausalLM.from_experts([teachers["low"]]), rows, validation, FAST)
    with pytest.raises(ValueError, match="expected float32"):
        heal(student.to(torch.bfloat16), teachers, rows, validation, FAST)


def test_inputs_are_left_as_they_were(case):
    student, teachers, rows, validation = case
    before = {name: weights(t) for name, t in teachers.items()}
    tokens = {name: r.tokens.clone() for name, r in rows.items()}
    heal(student, teachers, rows, validation, FAST)
    for name in teachers:
        assert same(before[name], weights(teachers[name]))
        assert torch.equal(tokens[name], rows[name].tokens)


def test_loss_reported_is_the_mean_kl_of_a_step(case):
    student, teachers, rows, validation = case
    rows = {name: Rows(r.tokens[:3], r.bytes) for name, r in rows.items()}
    expected = 0.0
    with torch.no_grad():
        for name, r in rows.items():
            log_q = student(r.tokens).logits[:, :-1].log_softmax(-1)
            log_p = teachers[name](r.tokens).logits[:, :-1].log_softmax(-1)
            expected += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True)) / (6 * 15)
    result = heal(student, teachers, rows, validation, replace(FAST, tokens=96))
    assert result.curve[-1].loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_text_counts_its_own_next_tokens(case, share):
    """All of it: cross-entropy alone. None given: 0.8 where the owner has another tokenizer, nothing elsewhere."""
    student, teachers, rows, validation = case
    rows = {name: Rows(r.tokens[:3], r.bytes) for name, r in rows.items()}
    expected = 0.0
    with torch.no_grad():
        for name, r in rows.items():
            tokens = r.tokens[:, :-1]
            ours, theirs = student(tokens).logits, teachers[name](tokens).logits
            expected += float((1 - share) * kl(ours, theirs).sum() + share * next_token(ours, tokens)) / (6 * 15)
    result = heal(student, teachers, rows, validation, replace(FAST, tokens=96, text=share))
    assert result.curve[-1].loss == pytest.approx(expected, rel=1e-5)
    assert [FAST.text_share(foreign=f) for f in (True, False)] == [0.8, 0.0]
