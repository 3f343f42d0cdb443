"""Texts that an expert writes itself: drawn from it alone, the same each time, and enough to merge by."""

import math

import pytest
import torch
import yaml
from conftest import BYTES, byte_tokenizer, save_tiny_model

import polymerge
from polymerge.calibrate.written import PROMPT, lacking, with_written, written
from polymerge.errors import CheckpointError, OutputError, TextError
from polymerge.model.source import Source
from polymerge.recipe import parse


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A model that looks at the last token alone: b after a, c after b, a after c; d or e after d and e."""
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path_factory.mktemp("parrot") / "model", num_hidden_layers=1, bos_token_id=None)
    model, vocab = AutoModelForCausalLM.from_pretrained(folder), byte_tokenizer().get_vocab()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
                weight.zero_()
        for i, (now, following) in enumerate({"a": "b", "b": "c", "c": "a", "d": "de", "e": "de"}.items()):
            model.model.embed_tokens.weight[vocab[now], i] = 1.0
            for token in following:
                model.lm_head.weight[vocab[token], i] = 8.0
        model.model.embed_tokens.weight[BYTES - 1, 0] = 1.0  # the beginning of a text is as a is
    model.save_pretrained(folder)
    return Source(folder)


def test_an_expert_writes_what_it_expects(parrot):
    first = written(parrot, byte_tokenizer(), 2000, texts=["abcabcabcabcabcabcabc"])
    assert all(text in "abc" * 99 for text in first)
    assert {len(text) for text in first} == {128}  # as long as its context
    free = written(parrot, byte_tokenizer(), 2000)
    assert all(text in "bca" * 99 for text in free)


@pytest.mark.parametrize("texts", [(), ("a text that it goes on from, again and again",)])
def test_what_it_goes_on_from_begins_as_its_texts_do(texts, parrot, monkeypatch):
    from tokenizers import processors
    from transformers import GenerationMixin

    tokenizer, begun, generate = byte_tokenizer(), [], GenerationMixin.generate
    tokenizer.bos_token = "!"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("! $0", special_tokens=[("!", bos)])

    def generating(self, inputs, **more):
        begun.append(inputs)
        return generate(self, inputs, **more)

    monkeypatch.setattr(GenerationMixin, "generate", generating)
    written(parrot, tokenizer, 5000, texts=texts)
    assert len(begun) > 1
    assert all(bool((rows[:, 0] == bos).all()) for rows in begun)
    assert max(rows.shape[1] for rows in begun) > 1


@pytest.mark.parametrize("positions", [8, PROMPT])
def test_an_expert_with_few_positions_goes_on_from_fewer_tokens(positions, tmp_path):
    source = Source(save_tiny_model(tmp_path, max_position_embeddings=positions))
    assert written(source, byte_tokenizer(), 100, texts=["a text that it goes on from, again and again"])


def test_it_is_drawn_at_its_own_temperature(parrot):
    text = "".join(written(parrot, byte_tokenizer(), 20_000, texts=["d" * PROMPT]))
    assert set(text) == {"d", "e"}
    drawn = text.replace("d" * PROMPT, "", 1)
    assert abs(drawn.count("e") / len(drawn) - 0.5 * (1 - PROMPT / 128)) < 0.02


def test_the_same_seed_writes_the_same_and_leaves_the_generator_alone(parrot):
    state = torch.get_rng_state()
    one, other, third = (written(parrot, byte_tokenizer(), 5000, seed=seed, texts=["dedd" * 9]) for seed in (0, 0, 1))
    assert one == other
    assert one != third
    assert torch.equal(torch.get_rng_state(), state)
    assert 5000 <= sum(map(len, one)) < 5000 + 32 * 128


def test_what_is_written_only_adds_to_calibration(parrot, tmp_path):
    from polymerge.calibrate.texts import read_skill

    (tmp_path / "t.txt").write_text("".join(f"dede {i}\n\n" for i in range(400)))
    skill = read_skill("t", [tmp_path / "t.txt"])
    more = with_written(skill, "t", parrot, byte_tokenizer(), 1000)
    assert (more.test, more.validation) == (skill.test, skill.validation)
    assert more.calibration[: len(skill.calibration)] == skill.calibration
    assert len(more.calibration) - len(skill.calibration) == more.written > 0
    assert more.split_record()["written"] == more.written


def test_a_mute_expert_is_refused(parrot, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parrot.path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[BYTES - 1] = 1e3 * model.model.norm.weight.sign()
        model.model.embed_tokens.weight.fill_(1.0)
    model.save_pretrained(tmp_path)
    with pytest.raises(TextError, match="the expert writes nothing; give the skill a text"):
        written(Source(tmp_path), byte_tokenizer(), 100)


def test_what_texts_lack_is_counted(tmp_path):
    from polymerge.calibrate.texts import read_skill

    (tmp_path / "t.txt").write_text("".join(f"dede {i}\n\n" for i in range(400)))
    skill = read_skill("t", [tmp_path / "t.txt"])
    have = sum(map(len, skill.calibration))  # a byte is a token
    assert [lacking(skill, byte_tokenizer(), have + n) for n in (-9, 0, 7)] == [0, 0, 7]


def test_a_merge_writes_what_its_texts_lack_unless_told_not_to(tmp_path):
    save_tiny_model(tmp_path / "a", num_hidden_layers=1)
    (tmp_path / "a.txt").write_text("".join(f"apple pie {i * i}\n" for i in range(120)))
    fold = {"length": 16, "tokens": 4000, "refine": 1}
    recipe = {"method": "fold", "anchor": "a", "size": {"params": "1.0x"}, "fold": fold}
    said = {}
    for write, dry in ((None, False), (0, False), (None, True)):
        data = {**recipe, "experts": {"a": {"model": "a", "text": "a.txt", "write": write}}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
        result = polymerge.merge(tmp_path / "recipe.yaml", tmp_path / f"out-{write}-{dry}", dry_run=dry)
        said[write, dry] = [f.text for f in result.report.findings if f.subject == "a: text"]
    assert any("that the expert wrote itself are added" in text for text in said[None, False])
    assert [text.partition(";")[2] for text in said[0, False]] == [" fold.tokens asks for 4,000"]
    assert [text.rpartition(";")[2] for text in said[None, True]] == [" the expert will write the rest"]


def test_an_experts_own_writing_does_not_make_it_an_owner(parrot, tmp_path):
    from dataclasses import replace

    from polymerge.calibrate.texts import read_skill
    from polymerge.readers import calibrate

    other = Source(save_tiny_model(tmp_path / "other", num_hidden_layers=1))
    (tmp_path / "t.txt").write_text("".join(f"dede{'edde' * (i % 90)}\n\n" for i in range(400)))
    real = read_skill("t", [tmp_path / "t.txt"])
    theirs = replace(real, calibration=["apple pie " * 40] * 9, written=9)  # which the parrot reads worse
    experts, skills = {"parrot": parrot, "other": other}, {"parrot": real, "other": theirs}
    data = {"method": "fold", "anchor": "parrot", "fold": {"length": 16, "tokens": 320}}
    asked = parse({**data, "experts": {name: {"model": "-", "text": "-"} for name in experts}})
    own = calibrate(asked, experts, {k: replace(s, written=0) for k, s in skills.items()}, byte_tokenizer())[1]
    assert own == {"parrot": "parrot", "other": "other"}
    assert calibrate(asked, experts, skills, byte_tokenizer())[1] == {"parrot": "parrot", "other": "parrot"}


def test_a_damaged_expert_is_told_before_it_writes(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path / "a", num_hidden_layers=1)
    weights = load_file(tmp_path / "a/model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, tmp_path / "a/model.safetensors", {"format": "pt"})
    experts = {"a": {"model": str(tmp_path / "a"), "write": "1k"}}
    data = {"method": "fold", "anchor": "a", "size": {"params": "1.0x"}, "experts": experts}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        polymerge.merge(parse(data), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(OutputError, match="is not empty"):
        polymerge.merge(parse(data), tmp_path / "out")


def test_a_merge_without_any_text(tmp_path):
    save_tiny_model(tmp_path / "a", num_hidden_layers=1)
    save_tiny_model(tmp_path / "b", "gpt_neox", hidden_size=24, num_attention_heads=2, seed=1)
    recipe = {
        "method": "fold", "anchor": "a", "size": {"params": "1.5x"},
        "experts": {name: {"model": name, "write": "3k"} for name in "ab"},
        "fold": {"length": 16, "tokens": 320, "refine": 1}, "heal": {"tokens": 256, "batch_rows": 8, "length": 16},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    one, other = (polymerge.merge(tmp_path / "recipe.yaml", tmp_path / name) for name in ("one", "other"))
    assert all(math.isfinite(row["healed"]) for row in one.skills.values())
    assert one.skills == other.skills
    said = [f.text for f in one.report.of("warning") if f.subject == "a: text"]
    assert any("all written by the expert itself" in text for text in said)
