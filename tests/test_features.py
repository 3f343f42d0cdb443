"""Features: the slices of a fold hold the experts' states, and healing may hold the result to them."""

from dataclasses import replace

import pytest
import torch
from test_fold import EXACT, NO_REFINE, expert, shape, texts
from test_heal import FAST, Interrupt, model, same, text, weights
from transformers import AutoModelForCausalLM

from polymerge.align.width import heed
from polymerge.features import Features
from polymerge.heal import heal
from polymerge.methods import fold as folding
from polymerge.methods._layers import LayerFold
from polymerge.model import decoder


def states(run, weights, tokens):
    """The target's `hidden_states`, as transformers has them but for the last, which is not normed."""
    found = [decoder.embed(run.target, weights[None], tokens)]
    for index in range(run.target.layers):
        found.append(decoder.layer(run.target, weights[index], found[-1]).out)
    return found


@pytest.mark.parametrize(
    ("family", "most"),
    [
        ("llama", 1e-6),
        ("mistral", 1e-6),
        ("qwen2", 1e-3),
        ("qwen3", 0.05),
        ("gpt2", 0.4),
        ("gpt_neox", 0.25),
        ("phi3", 1e-6),
        ("granite", 1e-6),
        ("gemma", 1e-4),
        ("stablelm", 0.1),
        ("starcoder2", 0.05),
        ("gemma2", 0.4),
        ("gemma3_text", 0.4),
        ("olmo2", 0.2),
        ("olmo3", 0.6),
        ("smollm3", 0.05),
    ],
)
def test_a_fold_at_full_size_holds_the_states_of_its_expert(family, most, save_model, tmp_path):
    """As transformers gives them: exactly where a Llama can, nearly elsewhere. Another layer's states it misses."""
    source = expert(save_model, tmp_path, family, num_hidden_layers=3)
    data, size = texts(1, rows=90), source.spec
    made, (target,) = shape(
        [source], width=size.width + size.has_constants, layers=3, heads=size.heads, mlp=size.mlp * 2
    )
    found: dict = {}
    run = LayerFold(
        [source], target, data, folding.bases_of([source], data, folding.Settings()), EXACT, NO_REFINE, bias=made.bias
    )
    run.run(lambda layer, some: found.setdefault(layer, {}).update(some))
    [features] = run.features()
    assert features.layers == ((0, 0), (1, 1))
    assert features.start == int(size.has_constants)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        theirs = whole(data.tokens, output_hidden_states=True).hidden_states
        mine = states(run, found, data.tokens)
    features = replace(features, encoder=features.encoder.float())
    missed = float(features.missed(mine, theirs)) / data.tokens.numel()
    assert missed < most
    known = torch.arange(data.tokens.shape[1]).expand(data.tokens.shape) % 2 == 0
    spoilt = [state.masked_fill(~known[..., None], 1e6) for state in theirs]
    assert float(features.missed(mine, spoilt, known)) / int(known.sum()) == pytest.approx(missed, rel=0.5, abs=1e-9)
    late = replace(features, layers=((0, 1), (1, 1)))
    assert float(late.missed(mine, theirs)) / data.tokens.numel() > missed + 0.1


def test_what_is_missed_is_a_mean_over_layers_of_relative_errors():
    g = torch.Generator().manual_seed(0)
    encoder, theirs = torch.randn(6, 3, generator=g), [torch.randn(2, 5, 6, generator=g) for _ in range(4)]
    mine = [torch.randn(2, 5, 8, generator=g) for _ in range(4)]
    features = Features(encoder, 2, ((0, 0), (1, 2)), centred=True)
    expected = 0.0
    for i, j in features.layers:
        state = theirs[j + 1] - theirs[j + 1].mean(-1, keepdim=True)
        goal, weight = state @ encoder, heed((state**2).mean(-1))[..., None]
        expected += float(((mine[i + 1][..., 2:5] - goal) ** 2 * weight).mean() / (goal**2 * weight).mean()) * 10 / 2
    assert float(features.missed(mine, theirs)) == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_hosts_nothing_keeps_the_last_state(save_model, tmp_path):
    shallow = expert(save_model, tmp_path / "shallow", num_hidden_layers=2)
    deep = expert(save_model, tmp_path / "deep", num_hidden_layers=5)
    single = expert(save_model, tmp_path / "single", num_hidden_layers=1)
    experts = [shallow, deep, single]
    made, (target,) = shape(experts)
    data = texts(3, rows=12)
    bases = folding.bases_of(experts, data, folding.Settings())
    one, two, three = LayerFold(experts, target, data, bases, EXACT, NO_REFINE, bias=made.bias).features()
    assert one.layers == ((0, 0), (1, 0), (2, 0), (3, 0))
    assert two.layers == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert three is None  # its only state is behind its last layer
    assert one.start + one.encoder.shape[1] == two.start


def test_written_and_read(tmp_path):
    found = {
        "a": Features(torch.randn(4, 2), 3, ((0, 0), (1, 2)), centred=True),
        "b": Features(torch.randn(5, 3), 0, ((0, 1),)),
    }
    Features.save(found, tmp_path)
    again = Features.load(tmp_path)
    assert list(again) == ["a", "b"]
    for name, one in found.items():
        assert again[name].digest() == one.digest()
        assert (again[name].start, again[name].layers, again[name].centred) == (one.start, one.layers, one.centred)
        for change in ({"start": 9}, {"layers": ((0, 0),)}, {"centred": not one.centred}, {"encoder": 2 * one.encoder}):
            assert replace(one, **change).digest() != one.digest()
    assert Features.load(tmp_path / "nowhere") == {}


@pytest.fixture
def case():
    """(teachers, rows, validation, features): two deep enough to have a state between their layers."""
    teachers = {"low": model(1, num_hidden_layers=2), "high": model(2, "gpt2", num_hidden_layers=2)}
    rows = {"low": text(1, 0, 24), "high": text(2, 100, 17)}
    validation = {"low": text(3, 0, 8), "high": text(4, 100, 8)}
    eye = torch.eye(32)
    features = {"low": Features(eye[:, :16], 0, ((0, 0),)), "high": Features(eye[:, 16:], 16, ((0, 0),), centred=True)}
    return teachers, rows, validation, features


def student():
    return model(5, num_hidden_layers=2)


def missed(healed, teachers, rows, features):
    with torch.no_grad():
        mine, theirs = (
            {n: m(r.tokens, output_hidden_states=True).hidden_states for n, r in rows.items() for m in [pick(n)]}
            for pick in (lambda _: healed, teachers.get)
        )
        return sum(float(one.missed(mine[n], theirs[n])) for n, one in features.items())


def test_healing_with_features_comes_nearer_to_the_owners_states(case):
    teachers, rows, validation, features = case
    plain, held = student(), student()
    heal(plain, teachers, rows, validation, FAST)
    heal(held, teachers, rows, validation, replace(FAST, features=10.0), features=features)
    assert missed(held, teachers, rows, features) < 0.8 * missed(plain, teachers, rows, features)


def test_features_count_only_where_their_owner_teaches(case):
    teachers, rows, validation, features = case

    def healed(**change):
        found = student()
        options = {key: change.pop(key) for key in ("features", "guide") if key in change}
        heal(found, teachers, rows, validation, replace(FAST, **change), **options)
        return weights(found)

    plain = healed()
    assert not same(plain, healed(features=features))
    union = healed(teacher="union")
    assert same(union, healed(teacher="union", features=features))
    other = model(9)
    assert same(healed(guide=other), healed(guide=other, features=features))
    assert same(healed(text=1.0), healed(text=1.0, features=features))


def test_they_are_no_part_of_the_loss_that_is_told(case):
    teachers, rows, validation, features = case
    settings = replace(FAST, tokens=6 * 16, evaluate_every=1)
    alike, held = student(), student()
    told = heal(alike, teachers, rows, validation, settings).curve[-1].loss
    assert heal(held, teachers, rows, validation, settings, features=features).curve[-1].loss == pytest.approx(told)
    assert not same(weights(alike), weights(held))


def test_interrupted_with_features_gives_the_same_bytes(case, tmp_path):
    teachers, rows, validation, features = case
    whole, parts = student(), student()
    heal(whole, teachers, rows, validation, FAST, features=features)
    handle = parts.register_forward_pre_hook(Interrupt(17))
    with pytest.raises(KeyboardInterrupt):
        heal(parts, teachers, rows, validation, FAST, features=features, out=tmp_path)
    handle.remove()
    parts = student()
    heal(parts, teachers, rows, validation, FAST, features=features, out=tmp_path)
    assert same(weights(whole), weights(parts))
