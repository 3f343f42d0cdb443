"""Experts with another tokenizer: readings are causal and exact where they say so, projections are distributions."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import byte_tokenizer, save_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import polymerge
from polymerge import preflight
from polymerge.align.token_bytes import byte_view
from polymerge.align.translate import FLOOR, Translator
from polymerge.calibrate import speech
from polymerge.calibrate.foreign import Foreign, TranslatedTeacher
from polymerge.calibrate.speech import Speech
from polymerge.calibrate.texts import read_skill
from polymerge.errors import CheckpointError, PreflightError
from polymerge.model.source import Source
from polymerge.preflight import translation
from polymerge.readers import calibrate, readers_of
from polymerge.recipe import parse
from polymerge.teachers import across

TEXT = "an apple é 12 apples 🦊, ananas\n" * 8


def bpe(*merges: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, such as "ap" (of a and p) and "app" (of ap and p)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, *merges])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(m[:-1], m[-1]) for m in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


BYTES, FINE, COARSE = byte_tokenizer(), bpe("an", "ap", "pl"), bpe("ap", "app", "appl", "an", "ana")
PAIRS = [(BYTES, COARSE), (COARSE, BYTES), (FINE, COARSE), (COARSE, FINE), (COARSE, COARSE)]


def setting(anchor, donor):
    translator = Translator(byte_view(anchor), byte_view(donor), len(anchor))
    tokens = torch.tensor(anchor(TEXT)["input_ids"])
    rows = tokens[: len(tokens) // 20 * 20].view(-1, 20)
    translator.fit(rows)
    return translator, rows, translator.read(rows)


def random_log_probs(reading, size):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*reading.tokens.shape, size, generator=generator).log_softmax(-1)


@pytest.mark.parametrize(("anchor", "donor"), PAIRS)
def test_pairs_end_at_the_same_byte_or_before(anchor, donor):
    translator, rows, reading = setting(anchor, donor)
    mine, theirs = translator.anchor, translator.donor
    seen = 0
    for r, row in enumerate(rows.tolist()):
        waiting = dict(reading.pending[r])
        data = b"".join(mine.surface[i] for i in row)
        skipped = next(i for i in range(4) if data[i] & 0xC0 != 0x80)  # a row may begin inside a character
        for t in range(len(row)):
            before = b"".join(mine.surface[i] for i in row[: t + 1])
            last = int(reading.last[r, t])
            read = data[:skipped] * (last >= 0) + b"".join(
                theirs.surface[i] for i in reading.tokens[r, : last + 1].tolist()
            )
            assert before.startswith(read)
            assert bool(reading.exact[r, t]) == (last >= 0 and read == before)
            if last >= 0:
                assert read + waiting.get(t, b"") == before
            seen += bool(reading.exact[r, t])
    assert seen > rows.numel() // 3


@pytest.mark.parametrize(("anchor", "donor"), PAIRS)
def test_projections_are_distributions(anchor, donor):
    translator, rows, reading = setting(anchor, donor)
    q = translator.project(random_log_probs(reading, len(donor)), reading, rows)
    assert q.shape == (*rows.shape, len(anchor))
    assert torch.isfinite(q).all()
    torch.testing.assert_close(q.exp().sum(-1), torch.ones(rows.shape), atol=1e-4, rtol=0)


def test_with_one_tokenizer_nothing_is_lost():
    translator, rows, reading = setting(COARSE, COARSE)
    assert torch.equal(reading.tokens, rows)
    assert reading.exact.all()
    p = random_log_probs(reading, len(COARSE))
    q = translator.project(p, reading, rows).exp()
    difference = (q - p.exp()).abs().amax(-1)
    assert difference.max() < 3 * FLOOR


def test_bytes_that_both_have_written_keep_their_probability():
    """A donor of bytes: the probability of the anchor's actual next token is the product of its bytes'."""
    translator, rows, reading = setting(COARSE, BYTES)
    p = random_log_probs(reading, len(BYTES))
    q = translator.project(p, reading, rows)
    checked = 0
    for t in range(rows.shape[1] - 1):
        first, last = int(reading.last[0, t]), int(reading.last[0, t + 1])
        if not (reading.exact[0, t] and reading.exact[0, t + 1]):
            continue
        expected = sum(float(p[0, j, reading.tokens[0, j + 1]]) for j in range(first, last))
        assert float(q[0, t, rows[0, t + 1]]) == pytest.approx(expected, abs=1e-3)
        checked += last - first > 1
    assert checked >= 2


@pytest.mark.parametrize(("anchor", "donor"), PAIRS)
def test_a_text_has_the_probability_that_the_donor_gives_it(anchor, donor):
    translator, rows, reading = setting(anchor, donor)
    p = random_log_probs(reading, len(donor))
    q = translator.project(p, reading, rows)
    for r in range(len(rows)):
        ends = torch.nonzero(reading.exact[r]).flatten()
        t0, t1 = int(ends[0]), int(ends[-1])
        mine = sum(float(q[r, t, rows[r, t + 1]]) for t in range(t0, t1))
        steps = range(int(reading.last[r, t0]), int(reading.last[r, t1]))
        assert mine == pytest.approx(sum(float(p[r, j, reading.tokens[r, j + 1]]) for j in steps), abs=0.02)


def test_inside_a_longer_token_only_what_it_may_still_become_counts():
    """Donor's `appl` read as `ap`, `pl`: after `ap`, the mass of its tokens that begin with it, told by their rest."""
    translator, _, _ = setting(FINE, COARSE)
    piece = {s: i for i, s in enumerate(translator.donor.surface)}
    p = torch.zeros(len(COARSE))
    p[piece[b"app"]], p[piece[b"appl"]], p[piece[b"ap"]], p[piece[b"z"]] = 0.1, 0.3, 0.2, 0.4
    q = translator._inside(p, b"ap")
    mine = {s: i for i, s in enumerate(translator.anchor.surface)}
    assert float(q[mine[b"pl"]]) == pytest.approx(0.3)
    assert float(q[mine[b"p"]]) == pytest.approx(0.1)
    assert float(q.sum()) == pytest.approx(0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    save_tiny_model(folder / "prose", hidden_size=32, num_hidden_layers=1)
    save_tiny_model(
        folder / "code", "gpt_neox", hidden_size=24, num_attention_heads=2, num_hidden_layers=2, seed=1,
        vocab_size=len(COARSE), max_position_embeddings=64,
    )  # fmt: skip
    COARSE.save_pretrained(folder / "code")
    for name, word in (("prose", "apple pie"), ("code", "ana = [3]")):
        (folder / f"{name}.txt").write_text("".join(f"{word} {i * i}\n" for i in range(600)))
    return folder


@pytest.mark.parametrize("anchor", ["prose", "code"])
def test_a_merge_speaks_the_anchors_tokenizer(folder, anchor):
    recipe = {
        "method": "fold", "anchor": anchor, "size": {"params": "1.5x"}, "dtype": "float32",
        "experts": {k: {"model": str(folder / k), "text": str(folder / f"{k}.txt")} for k in ("prose", "code")},
        "fold": {"length": 16, "tokens": 640, "refine": 3},
        "heal": {"tokens": "1k", "batch_rows": 8, "length": 16},
    }  # fmt: skip
    path = folder / f"{anchor}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = polymerge.merge(path, folder / f"out-{anchor}")
    mine = AutoTokenizer.from_pretrained(folder / anchor)
    assert AutoTokenizer.from_pretrained(result.out).get_vocab() == mine.get_vocab()
    assert all(
        0 < row[column] < 20 for row in result.skills.values() for column in ("owner", "union", "fold", "healed")
    )
    assert result.shape["vocab"] == len(mine)


@pytest.mark.parametrize(("anchor", "other", "times"), [("prose", "code", 1.1), ("code", "prose", 1.0)])
def test_an_expert_with_longer_tokens_is_given_more_rows(folder, anchor, other, times):
    """So that it has as many positions to be fitted at; preflight counts the rows that are read."""
    length, most = 16, 40
    recipe = parse({
        "method": "fold", "anchor": anchor, "fold": {"length": length, "tokens": most * length},
        "experts": {k: {"model": str(folder / k), "text": str(folder / f"{k}.txt")} for k in (anchor, other)},
    })  # fmt: skip
    names = list(recipe.experts)
    sources = {k: Source(folder / k) for k in names}
    tokenizers = {k: AutoTokenizer.from_pretrained(folder / k) for k in names}
    skills = {k: read_skill(k, recipe.experts[k].text) for k in names}
    spoken = speech.resolve(recipe, tokenizers, {k: s.spec for k, s in sources.items()})
    readers = readers_of(recipe, sources, tokenizers, skills, spoken, [other])
    texts = calibrate(recipe, readers, skills, spoken.tokenizer, judge=False)[0]
    assert len(texts.of(0)) == most
    mine = (texts.owner == 1) & texts.fit
    assert int(mine.sum()) >= times * most
    assert texts.reading(1)[0].exact[mine].sum() == pytest.approx(most * length, rel=0.05)
    finer = preflight.finer(spoken, tokenizers[other], other, skills[other])
    assert int(mine.sum()) == pytest.approx(finer * most, rel=0.05)


def test_a_translated_teacher_and_a_foreign_expert_agree(folder):
    source = Source(folder / "code")
    translator, rows, _ = setting(BYTES, COARSE)
    foreign = Foreign("code", source, translator)
    model = AutoModelForCausalLM.from_pretrained(folder / "code", dtype=torch.float32)
    logs = TranslatedTeacher(model, foreign)(input_ids=rows).logits
    there = logs[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
    torch.testing.assert_close(foreign.log_probs(rows), there, atol=1e-4, rtol=1e-4)


def test_a_translated_teacher_shows_its_states_where_its_own_tokens_end(folder):
    translator, rows, reading = setting(BYTES, COARSE)
    model = AutoModelForCausalLM.from_pretrained(folder / "code", dtype=torch.float32)
    said = TranslatedTeacher(model, Foreign("code", Source(folder / "code"), translator))(
        input_ids=rows, output_hidden_states=True
    )
    theirs = model(input_ids=reading.tokens, output_hidden_states=True).hidden_states
    assert 0 < int(said.known.sum()) < rows.numel()
    assert len(said.hidden_states) == len(theirs)
    for row, time in said.known.nonzero().tolist():
        assert reading.exact[row, time]
        for found, own in zip(said.hidden_states, theirs, strict=True):
            torch.testing.assert_close(found[row, time], own[row, reading.last[row, time]])


def test_a_foreign_expert_reads_each_layer_once(folder, monkeypatch):
    source = Source(folder / "code")
    translator, rows, _ = setting(BYTES, COARSE)
    read, layer = [], source.layer
    monkeypatch.setattr(source, "layer", lambda index: read.append(index) or layer(index))
    foreign = Foreign("code", source, translator)
    several = foreign.log_probs(torch.cat([rows, rows]), batch=1)
    assert read == list(range(source.spec.layers))
    torch.testing.assert_close(several, foreign.log_probs(rows).repeat(2, 1), atol=1e-5, rtol=1e-5)
    read.clear()
    foreign.told(rows.repeat(40, 1))
    assert read == list(range(source.spec.layers))


def test_rows_longer_than_the_experts_positions_are_refused(folder):
    source = Source(folder / "code")
    translator, rows, _ = setting(COARSE, BYTES)
    foreign = Foreign("code", source, translator)
    with pytest.raises(PreflightError, match=r"set fold\.length and heal"):
        foreign.read(rows.flatten()[:100].repeat(40, 1))


def test_a_dry_run_refuses_rows_longer_than_the_experts_positions(folder, tmp_path):
    save_tiny_model(tmp_path / "prose", hidden_size=32, num_hidden_layers=1, max_position_embeddings=40)
    models = {"prose": tmp_path / "prose", "code": folder / "code"}
    recipe = {
        "method": "fold", "anchor": "code", "size": {"params": "1.5x"}, "fold": {"length": 32, "tokens": 640},
        "experts": {k: {"model": str(m), "text": str(folder / f"{k}.txt")} for k, m in models.items()},
    }  # fmt: skip
    with pytest.raises(PreflightError, match=r"prose: \d+% of the rows of 32 tokens are more than its 40 positions"):
        polymerge.merge(parse(recipe), tmp_path / "out", dry_run=True)


def test_a_union_of_two_tokenizers_is_merged_and_loads(folder):
    recipe = {
        "method": "union", "anchor": "prose", "dtype": "float32", "fold": {"length": 16, "tokens": 640},
        "experts": {k: {"model": str(folder / k), "text": str(folder / f"{k}.txt")} for k in ("prose", "code")},
    }  # fmt: skip
    path = folder / "union.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = polymerge.merge(path, folder / "out-union")
    assert [row["union"] for row in result.skills.values()] == [None, None]  # what the model loses more is not known
    assert result.worst_skill is None
    assert "not measured here" in next(f.text for f in result.report.findings if f.subject == "union")
    with pytest.raises(CheckpointError, match="a union that polymerge made; name the experts"):
        Source(result.out)
    model = AutoModelForCausalLM.from_pretrained(result.out, trust_remote_code=True)
    tokens = torch.tensor([BYTES("apple ana")["input_ids"]])
    probabilities = model(input_ids=tokens).logits.softmax(-1)
    assert torch.isfinite(probabilities).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(tokens.shape))


@pytest.mark.parametrize(("anchor", "donor"), PAIRS)
def test_a_guess_gives_distributions_too(anchor, donor):
    translator, rows, reading = setting(anchor, donor)
    generator = torch.Generator().manual_seed(1)
    guess = torch.randn(*rows.shape, len(anchor), generator=generator).softmax(-1)
    p = random_log_probs(reading, len(donor))
    for seen in (True, False):
        q = translator.project(p, reading, rows, guess, seen=seen)
        assert torch.isfinite(q).all()
        torch.testing.assert_close(q.exp().sum(-1), torch.ones(rows.shape), atol=1e-4, rtol=0)
    # The text still has the probability that the donor gives it.
    with_counts, with_guess = (
        translator.project(p, reading, rows, g)[:, :-1].gather(-1, rows[:, 1:, None]) for g in (None, guess)
    )
    torch.testing.assert_close(with_counts, with_guess, atol=0.02, rtol=0.02)


def test_a_guess_shares_out_what_the_donor_leaves_open():
    """A donor of bytes: tokens that begin with a byte have its probability together, and the guess's shares in it."""
    translator, rows, reading = setting(COARSE, BYTES)
    generator = torch.Generator().manual_seed(1)
    guess = torch.randn(*rows.shape, len(COARSE), generator=generator).softmax(-1)
    p = random_log_probs(reading, len(BYTES))
    view, byte = byte_view(COARSE), {b: i for i, b in enumerate(byte_view(BYTES).surface)}
    p[..., byte[b"a"]] += 5.0
    p = p.log_softmax(-1)
    alike = torch.tensor([i for i, b in enumerate(view.surface) if b[:1] == b"a" and not view.special[i]])
    assert len(alike) > 4
    compared = 0
    for seen in (True, False):
        q = translator.project(p, reading, rows, guess, seen=seen).exp()
        for t in range(rows.shape[1] - 1):
            if not (reading.exact[0, t] and reading.exact[0, t + 1]):
                continue
            asked = float(p[0, int(reading.last[0, t]), byte[b"a"]].exp())
            assert float(q[0, t, alike].sum()) == pytest.approx(asked, abs=3 * FLOOR)
            others = alike[alike != rows[0, t + 1]] if seen else alike
            shares, wanted = q[0, t, others], guess[0, t, others]
            if float(shares.sum()) < 20 * FLOOR:  # mostly the floor
                continue
            compared += 1
            torch.testing.assert_close(shares / shares.sum(), wanted / wanted.sum(), atol=0.03, rtol=0.05)
    assert compared > 3


def test_a_guess_of_the_truth_stays_the_truth():
    translator, rows, reading = setting(COARSE, COARSE)
    p = random_log_probs(reading, len(COARSE))
    q = translator.project(p, reading, rows, p.exp()).exp()
    assert (q - p.exp()).abs().max() < 3 * FLOOR


@pytest.mark.parametrize("kind", ["distribution", "likelihood"])
def test_the_loss_across_tokenizers(folder, kind):
    """Nothing where the student says what the teacher does, and more elsewhere."""
    source = Source(folder / "code")
    translator, rows, _ = setting(BYTES, COARSE)
    model = AutoModelForCausalLM.from_pretrained(folder / "code", dtype=torch.float32)
    teacher = TranslatedTeacher(model, Foreign("code", source, translator))
    student = torch.randn(*rows.shape, len(BYTES), generator=torch.Generator().manual_seed(2)).requires_grad_()
    alone, _ = across(student, teacher, rows, kind=kind)
    assert float(alone.detach()) > 0
    (slope,) = torch.autograd.grad(alone, student)
    assert torch.isfinite(slope).all()
    with torch.no_grad():
        same = teacher(input_ids=rows).logits
        assert float(across(same, teacher, rows, kind=kind)[0]) < 0.05 * float(alone)


def test_what_is_told_of_the_same_tokens_costs_nothing(folder):
    """And of longer ones told in bytes nothing either (random models even gain by the counts)."""
    source = Source(folder / "code")
    for anchor in (COARSE, BYTES):
        translator, rows, reading = setting(anchor, COARSE)
        own, told = Foreign("code", source, translator).told(rows)
        assert told < own + 0.05
        assert told > own - (0.02 if anchor is COARSE else 1)
        if anchor is COARSE:
            tokens = reading.tokens
            steps = source.log_probs(tokens).double().sum()
            size = sum(len(translator.donor.surface[i]) for i in tokens[:, 1:].flatten().tolist())
            assert own == pytest.approx(-float(steps) / math.log(2) / size, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "anchor", "needle"),
    [
        ("fold", "prose", "'code' has the longest tokens"), ("fold", "code", None),
        ("union", "code", "'prose' has the shortest tokens"), ("union", "prose", None),
    ],
)  # fmt: skip
def test_preflight_measures_what_telling_costs_and_advises_a_tokenizer(folder, tmp_path, method, anchor, needle):
    recipe = {
        "method": method, "anchor": anchor, "fold": {"length": 16, "tokens": 640},
        "experts": {k: {"model": str(folder / k), "text": str(folder / f"{k}.txt")} for k in ("prose", "code")},
        **({"size": {"params": "1.5x"}} if method == "fold" else {}),
    }  # fmt: skip
    findings = polymerge.merge(parse(recipe), tmp_path / "out", dry_run=True).report.findings
    told = {f.subject: f.text for f in findings}
    other = "prose" if anchor == "code" else "code"
    assert "bits per byte on validation text" in told[f"{other}: translation"]
    assert f"{anchor}: translation" not in told
    assert (needle or "") in told.get("tokenizer: length", "")
    assert ("tokenizer: length" in told) == (needle is not None)


def test_a_result_that_speaks_longer_tokens_than_every_expert_is_advised_nothing(monkeypatch):
    lengths = {id(BYTES): 1.0, id(COARSE): 2.0}
    monkeypatch.setattr(translation, "_bytes_per_token", lambda tokenizer, _: lengths.get(id(tokenizer), 3.0))
    experts, both = {"prose": BYTES, "code": COARSE}, Speech(object(), "prose", 10, union=True)
    assert translation._whose(both, experts, {}, union=False) == ""
    assert "'code' has the longest" in translation._whose(replace(both, tokenizer=BYTES), experts, {}, union=False)
