"""Laws of the union of experts whose tokenizers differ."""

import itertools
import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from byte_lm import END, ByteModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from polymerge.align.token_bytes import token_bytes
from polymerge.checkpoint.reader import Checkpoint
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.methods._union_config import UnionConfig
from polymerge.methods._union_donors import FLOOR, Reader
from polymerge.methods._union_modeling import UnionForCausalLM
from polymerge.methods.union import build_union, tables, union_config

# ------------------------------------------------------------ the exact reference

ALPHABET = [b"a", b"b", b"ab", b"ba", b"aab", b"b", None]  # two tokens are spelt alike, the last one ends a text


def toy(ids):
    """Log-probabilities (7,) that depend on all that was read."""
    seed = sum((i + 1) * 8**n for n, i in enumerate(ids)) % (2**31)
    return torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(0)


def brute_force(data, ids=()):
    """P(text begins with `data`), by the definition."""
    if not data:
        return 1.0
    total = 0.0
    for i, piece in enumerate(ALPHABET[:-1]):
        if data.startswith(piece) or piece.startswith(data):
            total += float(toy(ids)[i].exp()) * brute_force(data[len(piece) :], (*ids, i))
    return total


def strings(length):
    return [bytes(s) for s in itertools.product(b"ab", repeat=length)]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_bytes_against_brute_force(length):
    model = ByteModel(toy, ALPHABET, end=6)
    for data in strings(length):
        assert math.exp(model.log_probability(data)) == pytest.approx(brute_force(data), rel=1e-9)


def test_next_bytes_and_the_end_are_a_distribution():
    """P(s) = P(s ends) + Σ_b P(s b), for every string."""
    model = ByteModel(toy, ALPHABET, end=6)
    for data in strings(4):
        state = model.start()
        for byte in data:
            state = model.read(state, byte)
        following = model.next_byte(state)
        assert float(following.exp().sum()) == pytest.approx(1)
        for byte in b"ab":
            joint = model.log_mass(state) + float(following[byte])
            assert joint == pytest.approx(model.log_probability(data + bytes([byte])))
        assert math.exp(float(following[END])) > 0


def test_a_narrow_beam_gives_less_and_never_more():
    data = b"aababaab"
    exact = ByteModel(toy, ALPHABET, end=6).log_probability(data)
    narrow = [ByteModel(toy, ALPHABET, end=6, width=w).log_probability(data) for w in (1, 4, 64)]
    assert narrow[0] < exact
    assert narrow == sorted(narrow)
    assert narrow[-1] == pytest.approx(exact)


# ------------------------------------------------------------ the union model

TRAINING = [
    "def f(x):\n    return x * 2024\n" * 4,
    "the cat sat on the other mat, and then there were 12 345 others. " * 4,
]
TEXTS = ["the other cat", "def f(x):\n    return 12345 * x\n", "1,000,000 0x1F", "naïve 🎉👩‍👩‍👧 中文", " a  b\t\n\n"]
NAMES = ["plain", "merged", "pieces"]


@cache
def make_tokenizer(name: str) -> Any:
    """plain: one token a byte; merged: byte-level BPE; pieces: SentencePiece-like, with byte fallback."""
    if name == "pieces":
        trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        special = ["<unk>", "<s>", "</s>"]
        trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=special, show_progress=False)
        trained.train_from_iterator(TRAINING, trainer)
        facts = json.loads(trained.to_str())
        names = sorted(facts["model"]["vocab"], key=facts["model"]["vocab"].get)
        order = dict.fromkeys([*special, *(f"<0x{b:02X}>" for b in range(256)), *names])
        facts["model"]["vocab"] = {piece: i for i, piece in enumerate(order)}
        backend = Tokenizer.from_str(json.dumps(facts))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 if name == "plain" else 300,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>")


@cache
def expert(name: str, seed: int = 0) -> Any:
    """A random model of this tokenizer, whose predictions are far from even."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(make_tokenizer(name)), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def union_of(*names: str, alpha: float = 0.0, prior: list[float] | None = None) -> UnionForCausalLM:
    found, spoken = tables({f"{i}": make_tokenizer(n) for i, n in enumerate(names)}, "0")
    experts = [expert(n, i) for i, n in enumerate(names)]
    return UnionForCausalLM.from_experts(experts, alpha=alpha, prior=prior, tables=found, expert_tokenizers=spoken)


def ids_of(name: str, text: str) -> torch.Tensor:
    tokenizer = make_tokenizer(name)
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


PAIRS = list(itertools.permutations(NAMES, 2))


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_predictions_are_distributions_over_the_anchors_tokens(names):
    union = union_of(*names, alpha=0.01)
    for text in TEXTS:
        out = union(ids_of(names[0], text))
        assert out.logits.shape[-1] == len(make_tokenizer(names[0]))
        torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones_like(out.logits[..., 0]), atol=1e-6, rtol=0)
        assert out.logits.isfinite().all()


def test_an_anchor_without_weight_still_tells_what_a_donor_leaves_open():
    ids = ids_of("plain", TEXTS[0])
    even, alone = union_of("plain", "merged")(ids), union_of("plain", "merged", prior=[0.0, 1.0])(ids)
    assert (alone.gate_weights[..., 0] == 0).all()
    # Before anything is read half of the even union's prediction is the donor's, the rest the anchor's own.
    own = expert("plain")(ids).logits[:, 0].softmax(-1)
    torch.testing.assert_close((own + alone.logits[:, 0].exp()) / 2, even.logits[:, 0].exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_nothing_is_looked_up_ahead(names):
    """What is predicted after a prefix does not depend on what follows it."""
    union, ids = union_of(*names), ids_of(names[0], "the other return 12\n\n  naïve 🎉")
    whole = union(ids).logits
    for cut in (2, 5, ids.shape[1] - 2):
        torch.testing.assert_close(union(ids[:, :cut]).logits, whole[:, :cut], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_cached_decoding_is_the_whole(names):
    union, ids = union_of(*names, alpha=0.02), ids_of(names[0], "there 12 cats\n  🎉")
    whole, cache = union(ids), union.new_cache()
    out = [union(part, past_key_values=cache).logits for part in ids.split(3, dim=1)]
    torch.testing.assert_close(torch.cat(out, 1), whole.logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    union = union_of("merged", "pieces")
    short, long = (ids_of("merged", t)[0] for t in ("the mat", "def f(x):\n    return 🎉"))
    gap = len(long) - len(short)
    padding, keep = torch.zeros(gap, dtype=torch.long), slice(gap, None) if side == "left" else slice(0, len(short))
    row, ones = [padding, short], [padding, torch.ones_like(short)]
    row, ones = (row, ones) if side == "left" else (row[::-1], ones[::-1])
    mask = torch.stack([torch.cat(ones), torch.ones_like(long)])
    out = union(torch.stack([torch.cat(row), long]), mask)
    torch.testing.assert_close(out.logits[0, keep], union(short[None]).logits[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(out.logits[1], union(long[None]).logits[0], atol=1e-9, rtol=1e-9)


def test_bayes_bound_for_what_is_predicted():
    """α = 0: at most ln 2 nats worse than the anchor and than the donor's own prediction of the anchor's tokens."""
    union = union_of("merged", "plain")
    for text in TEXTS:
        ids = ids_of("merged", text)
        total = -union(ids).logits[:, :-1].gather(-1, ids[:, 1:, None]).sum()
        anchor = expert("merged", 0)(ids).logits.log_softmax(-1)
        reader = Reader(union._projection(1))
        donor = 0.0
        for t, token in enumerate(ids[0, :-1].tolist()):
            reader.take(union.experts[1], token)
            donor -= float(reader.predict(anchor[0, t])[ids[0, t + 1]])
        alone = -anchor[:, :-1].gather(-1, ids[:, 1:, None]).sum()
        assert float(total) <= min(float(alone), donor) + math.log(2) + 1e-4


def test_a_byte_anchor_hears_a_donor_exactly():
    """Where the anchor's tokens are bytes nothing is approximated: the donor is its exact byte model."""
    donor, tokenizer = expert("merged", 1), make_tokenizer("merged")
    end = tokenizer.eos_token_id

    def predict(ids):
        return donor(torch.tensor([[end, *ids]])).logits[0, -1].log_softmax(-1)

    union, data = union_of("plain", "merged"), b"the other"
    exact = ByteModel(predict, token_bytes(tokenizer), end=end)
    state, reader, projection = exact.start(), Reader(union._projection(1)), union._projection(1)
    even = torch.full((257,), 1 / 257, dtype=torch.float64).log()
    reader.take(donor, make_tokenizer("plain").bos_token_id)
    place = torch.tensor([projection.anchor.single[b] for b in range(256)])
    for byte in data[:5]:
        found = reader.predict(even)[place].exp()
        expected = (1 - FLOOR) * exact.next_byte(state)[:256].exp() + FLOOR / 257
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # light heads are dropped
        reader.take(donor, projection.anchor.single[byte])
        state = exact.read(state, byte)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_generated_text_is_never_garbled(names):
    """The tokens spell the prompt's bytes and more, and decode to what these bytes are."""
    union, tokenizer = union_of(*names, alpha=0.01), make_tokenizer(names[0])
    surface = token_bytes(tokenizer)
    for text in TEXTS[:4]:
        ids = ids_of(names[0], text)
        out = union.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        again = union.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, use_cache=False)
        assert torch.equal(out, again)
        spelt = b"".join(surface[i] or b"" for i in out[0].tolist())
        assert spelt.removeprefix(b" ").startswith(text.encode())
        # A random model may leave a character unfinished: only what is whole can be compared.
        whole = spelt.removeprefix(b" ").decode(errors="ignore")[: len(text)]
        assert whole == text
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == text


def test_beams():
    union, ids = union_of("merged", "pieces"), ids_of("merged", "the cat")
    out = union.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, num_beams=2, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 3)


def test_three_experts_and_two_tokenizers():
    union = union_of("merged", "plain", "merged")
    assert union.config.expert_tokenizers == [0, 1, 0]
    assert union(ids_of("merged", "the cat")).logits.isfinite().all()


def test_one_tokenizer_leaves_no_trace():
    assert tables({"a": make_tokenizer("plain"), "b": make_tokenizer("plain")}, "a") == ([], [])
    assert "tokenizers" not in union_of("plain", "plain").config.to_dict()


def test_sleep_is_refused():
    with pytest.raises(ValueError, match="skip_below 0 where tokenizers differ"):
        UnionConfig(
            [expert(n).config.to_dict() for n in NAMES], skip_below=0.1, tokenizers=[1, 1], expert_tokenizers=[0, 1, 0]
        )


@pytest.mark.usefixtures("remote_code_cache")
def test_a_checkpoint_keeps_its_tokenizers(tmp_path):
    names = {"a": "merged", "b": "pieces"}
    for seed, (key, name) in enumerate(names.items()):
        expert(name, seed).save_pretrained(tmp_path / key)
    experts = {key: Checkpoint(tmp_path / key) for key in names}
    tokenizers = {key: make_tokenizer(name) for key, name in names.items()}
    config = union_config(experts, tokenizers=tokenizers, alpha=0.0)
    with CheckpointWriter(tmp_path / "out") as writer:
        build_union(experts, writer, config, tokenizers=tokenizers)
    ids = ids_of("merged", "the other 🎉")
    expected = union_of("merged", "pieces")(ids).logits
    for folder in ("out", "again"):
        union = AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True, dtype=torch.float64)
        torch.testing.assert_close(union(ids).logits, expected, atol=1e-9, rtol=1e-9)
        if folder == "out":
            union.save_pretrained(tmp_path / "again")
