"""Laws of alignment between tokenizers: bytes of tokens, spans of texts, maps of vocabularies."""

import json
import random
import re
import resource
import time
from dataclasses import FrozenInstanceError
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from polymerge.align.pieces import cut
from polymerge.align.same import same_vocabulary
from polymerge.align.spans import by_offsets, common_boundaries, encode, spans
from polymerge.align.token_bytes import BYTE_CHARACTER, CHARACTER_BYTE, ByteView, byte_view, token_bytes
from polymerge.align.vocab import Kind, shared, vocab_map
from polymerge.errors import PreflightError, TextError

PROSE = " ".join(d for d in (str.__doc__, random.__doc__, json.__doc__, re.__doc__, time.__doc__) if d)
TRAINING = [
    *PROSE.splitlines(),
    "def f(x):\n    if x > 10:\n        return 3.14159 * x\n    return 2024",
    "naïve café œuvre — “quoted” … 12,345.67 and 1000000",
    "中文字符和日本語のテキスト 한국어",
    "مرحبا بالعالم العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🎉🎉",
]
TEXTS = [
    "",
    "a",
    " ",
    "    ",
    "the cat sat",
    " leading and trailing ",
    "0 12 345 6789 3.14159 1,000,000 0x1F 1e-9",
    "a  b   c\t\td\n\n\n  e \r\n f\u00a0g\u2003h",
    "def f(x):\n    if x:\n\t\treturn {\n            'a': [1, 2],\n        }\n",
    "中文字符。日本語のテキスト、한국어 文字",
    "مرحبا بالعالم ١٢٣ العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 🎉🇩🇪",
    "e\u0301 n\u0303 a\u0308\u0323 Z͑ͫ̓a̴l̵g̶o",
    "nul \x00 and \x01\x1b[0m\x7f control",
    "▁literal▁ mark and <0x41> and ## marks",
    "\ufeffBOM \u200b\u200d\u2028 and \U0010ffff",
]
SPECIALS = ["<unk>", "<s>", "</s>"]


def fast(backend: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def edited(backend: Tokenizer, **model: Any) -> Tokenizer:
    described = json.loads(backend.to_str())
    described["model"].update(model)
    return Tokenizer.from_str(json.dumps(described))


@cache
def byte_level(size: int = 600, *, digits: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    before = [pre_tokenizers.Digits(individual_digits=True), level] if digits else [level]
    backend.pre_tokenizer = pre_tokenizers.Sequence(before)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TRAINING, trainer)
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return fast(backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


@cache
def metaspace(size: int = 500, *, prepend: bool = False) -> PreTrainedTokenizerFast:
    """Llama-like: BPE over U+2581 with byte fallback; the dummy space by a Metaspace or a Prepend step."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    split = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.pre_tokenizer = split
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, limit_alphabet=60, show_progress=False)
    backend.train_from_iterator(TRAINING, trainer)
    learned = json.loads(backend.to_str())["model"]
    names = sorted(learned["vocab"], key=learned["vocab"].get)
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    order = dict.fromkeys([*SPECIALS, *fallback, *names])
    backend = edited(backend, vocab={p: i for i, p in enumerate(order)})
    if prepend:
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def unigram(*, fallback: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(PROSE.splitlines(), trainer)
    if fallback:
        vocab = json.loads(backend.to_str())["model"]["vocab"]
        vocab += [[f"<0x{b:02X}>", -30.0] for b in range(256)]
        backend = edited(backend, vocab=vocab, byte_fallback=True)
    return fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    backend.train_from_iterator(TRAINING, trainer)
    return fast(backend, unk_token="[UNK]", pad_token="[PAD]")


@cache
def view(name: str) -> ByteView:
    return byte_view(MAKE[name]())


MAKE = {
    "byte-level": byte_level,
    "byte-level small": lambda: byte_level(300, digits=True),
    "metaspace": metaspace,
    "metaspace prepend": lambda: metaspace(450, prepend=True),
    "unigram": unigram,
    "unigram unk": lambda: unigram(fallback=False),
    "wordpiece": wordpiece,
}
EXACT = [n for n in MAKE if n not in {"unigram unk", "wordpiece"}]

ANY_TEXT = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=12),
        st.sampled_from([t for t in TEXTS if t]),
        st.sampled_from([" ", "  ", "\n    ", "\t", "7", "1234", "\u0301", "\u200d", "\x00", "👩‍👧", "▁", "ß"]),
    ),
    max_size=8,
).map("".join)
LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


# ---- bytes of tokens


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("byte-level", "byte-level"),
        ("metaspace", "metaspace"),
        ("metaspace prepend", "metaspace"),
        ("unigram", "metaspace"),
        ("wordpiece", "words"),
    ],
)
def test_kind_is_read_from_the_description(name: str, kind: str) -> None:
    assert view(name).kind == kind


def test_byte_alphabet_is_a_bijection_and_that_of_the_library() -> None:
    assert sorted(BYTE_CHARACTER) == list(range(256))
    assert set(CHARACTER_BYTE) == set(pre_tokenizers.ByteLevel.alphabet())
    for text in TEXTS:
        found = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert bytes(CHARACTER_BYTE[c] for piece, _ in found for c in piece) == text.encode()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("text", [t for t in TEXTS if "▁" not in t])
def test_tokens_bytes_put_together_are_the_text(name: str, text: str) -> None:
    known = view(name).bytes
    ids = MAKE[name]()(text, add_special_tokens=False)["input_ids"]
    joined = b"".join(known[i] or b"<special>" for i in ids)
    assert joined in (text.encode(), b" " + text.encode())


def test_special_tokens_have_no_bytes_and_added_tokens_do() -> None:
    tokenizer = byte_level()
    known = token_bytes(tokenizer)
    assert len(known) == len(tokenizer)
    assert known[tokenizer.eos_token_id] is None
    assert known[tokenizer.convert_tokens_to_ids("<tool_call>")] == b"<tool_call>"
    assert sum(b is None for b in known) == 1
    assert token_bytes(metaspace())[:3] == [None] * 3


def test_fallback_tokens_are_single_bytes() -> None:
    tokenizer = metaspace()
    known = token_bytes(tokenizer)
    for b in range(256):
        assert known[tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>")] == bytes([b])
    # without byte fallback the same piece is its own text
    plain = Tokenizer(models.BPE(vocab={"<0x41>": 0, "▁": 1}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    assert token_bytes(fast(plain)) == [b"<0x41>", b" "]


def test_unknown_token_of_the_model_has_no_bytes_without_a_role() -> None:
    assert token_bytes(fast(Tokenizer(models.BPE(vocab={"?": 0, "a": 1}, merges=[], unk_token="?")))) == [
        None,
        b"a",
    ]
    scores = [("a", -1.0), ("?", -2.0)]
    assert token_bytes(fast(Tokenizer(models.Unigram(scores, unk_id=1, byte_fallback=False)))) == [b"a", None]


def test_holes_in_the_ids_have_no_bytes() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 3}, merges=[]))
    assert token_bytes(fast(backend)) == [b"a", None, None, b"b"]


def test_added_token_of_the_model_is_in_its_alphabet() -> None:
    backend = Tokenizer(models.BPE(vocab={"▁": 0, "▁▁": 1, "a": 2}, merges=[("▁", "▁")]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("▁new", normalized=False)])
    assert token_bytes(fast(backend)) == [b" ", b"  ", b"a", "▁new".encode()]


def test_wordpiece_is_refused_and_by_convention_on_request() -> None:
    with pytest.raises(PreflightError, match="WordPiece"):
        token_bytes(wordpiece())
    with pytest.raises(PreflightError, match="WordPiece"):
        shared(byte_level(), wordpiece())
    words = view("wordpiece")
    reasons = " ".join(words.lossy)
    assert "BertNormalizer" in reasons
    assert "BertPreTokenizer" in reasons
    inside = next(i for i, p in enumerate(words.pieces) if p.startswith("##"))
    assert words.bytes[inside] == words.pieces[inside][2:].encode()
    assert words.bytes[words.pieces.index(",")] == b","
    ids, _ = shared(byte_level(), words)
    assert len(ids) > 10


def test_lossy_steps_are_named() -> None:
    assert view("byte-level").lossy == ()
    assert view("metaspace").lossy == ()
    assert view("metaspace prepend").lossy == ()
    assert "no byte fallback" in view("unigram unk").lossy[0]
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    assert byte_view(fast(backend)).lossy == (
        "normalizer NFC changes the text",
        "normalizer Lowercase changes the text",
    )
    backend.normalizer = None
    level = pre_tokenizers.ByteLevel(use_regex=False)
    for behavior, invert, count in (("removed", False, 1), ("removed", True, 0), ("isolated", False, 0)):
        split = pre_tokenizers.Split(" ", behavior, invert=invert)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        assert len(byte_view(fast(backend)).lossy) == count
    few = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    few.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert byte_view(fast(few)).lossy == ("241 bytes have no token of their own",)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(PreflightError, match="not a fast tokenizer"):
        token_bytes(object())


# ---- spans


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("text", TEXTS)
def test_spans_cover_the_text(name: str, text: str) -> None:
    check_spans(view(name), text)


@pytest.mark.parametrize("name", list(MAKE))
@LIGHT
@given(text=ANY_TEXT)
def test_spans_cover_any_text(name: str, text: str) -> None:
    check_spans(view(name), text)


def check_spans(known: ByteView, text: str) -> None:
    ids, found = encode(known, text)
    data = text.encode()
    assert found.dtype == torch.int64
    assert len(found) == len(ids) + 1
    assert found[0] == 0
    assert bool((found.diff() >= 0).all())
    assert found[-1] == (len(data) if len(ids) else 0)
    if known.lossy or "▁" in text or "<0x" in text:
        return
    for k, (i, a, b) in enumerate(zip(ids.tolist(), found.tolist(), found[1:].tolist(), strict=False)):
        expected = known.surface[i]
        assert data[a:b] == expected or (expected[:1] == b" " and k == 0 and data[a:b] == expected[1:])


@pytest.mark.parametrize("name", EXACT)
@LIGHT
@given(text=ANY_TEXT.filter(lambda t: "▁" not in t and "<0x" not in t and not t.startswith(" ")))
def test_offsets_and_bytes_give_the_same_spans(name: str, text: str) -> None:
    """The way for normalized text agrees with the exact way where both are possible."""
    known = view(name)
    ids, found = encode(known, text)
    if not len(ids):
        return
    offsets = known.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = by_offsets(text, text.encode(), [known.surface[i] for i in ids.tolist()], offsets)
    assert ends == found[1:].tolist()


def test_a_token_may_end_inside_a_character() -> None:
    known = byte_view(metaspace())
    ids, found = encode(known, "a\U0010ffffb")
    inside = [b for b in found.tolist() if 1 < b < 5]
    assert inside == [2, 3, 4]
    assert len(ids) == 6


def test_dummy_space_has_no_bytes() -> None:
    known = byte_view(metaspace())
    ids, found = encode(known, "\U0010ffff")
    assert known.surface[int(ids[0])] == b" "
    assert found.tolist() == [0, 0, 1, 2, 3, 4]


def test_normalized_text_keeps_its_own_bytes() -> None:
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(CHARACTER_BYTE))}, merges=[]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids, found = encode(fast(backend), "ae\u0301b")
    assert len(ids) == 4  # a, two bytes of é, b
    assert found.tolist() == [0, 1, 2, 4, 5]  # the accent counts with é, which stands for it


def test_chat_with_special_tokens_in_the_text() -> None:
    tokenizer = Tokenizer.from_str(metaspace().backend_tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    text = "<|im_start|>user\n 世界 3+4<|im_start|>assistant\nsure ▁"
    a_ids, a = encode(fast(tokenizer), text)
    _, b = encode(byte_level(), text)
    mark = tokenizer.token_to_id("<|im_start|>")
    places = (a_ids == mark).nonzero()[:, 0]
    assert [text.encode()[a[p] : a[p + 1]] for p in places] == [b"<|im_start|>"] * 2
    assert a[-1] == b[-1] == len(text.encode())


def test_added_tokens_that_swallow_spaces_and_dummies_in_the_middle() -> None:
    backend = Tokenizer.from_str(metaspace(450, prepend=True).backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("<|user|>", rstrip=True, special=True)])
    known = byte_view(fast(backend))
    text = "<|user|>  世 x<|user|>\n y<|user|>z"
    ids, found = encode(known, text)
    data = text.encode()
    covered = [
        (known.pieces[i], data[a:b])
        for i, a, b in zip(ids.tolist(), found[:-1].tolist(), found[1:].tolist(), strict=True)
    ]
    assert [b for p, b in covered if p == "<|user|>"] == [b"<|user|>  ", b"<|user|>\n ", b"<|user|>"]
    after = [(p, b) for (q, _), (p, b) in pairwise(covered) if q == "<|user|>"]
    for piece, found_bytes in after:  # the dummy space of each part covers nothing
        assert piece.startswith("▁")
        assert found_bytes == piece[1:].encode()


def test_offsets_tell_a_dummy_space_from_a_real_one() -> None:
    # a real space and the first byte of a character in one token
    text = "x 中"
    assert by_offsets(text, text.encode(), [b"x", b" \xe4", b"\xb8\xad"], [(0, 1), (1, 3), (2, 3)]) == [
        1,
        3,
        5,
    ]
    # a dummy space before a real one, in the middle of a text
    backend = Tokenizer.from_str(metaspace(450, prepend=True).backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("<|user|>", special=True)])
    known = byte_view(fast(backend))
    ids, found = encode(known, "a<|user|> the")
    assert [known.pieces[i] for i in ids.tolist()] == ["▁a", "<|user|>", "▁", "▁the"]
    assert found.tolist() == [0, 1, 9, 9, 13]


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(TextError, match="character 1 is a lone surrogate"):
        spans(byte_level(), "a\ud800")


# ---- boundaries in common


@st.composite
def boundaries(draw: Any) -> torch.Tensor:
    total = draw(st.integers(1, 30))
    inner = draw(st.lists(st.integers(0, total), max_size=20))
    return torch.tensor([0, *sorted(inner), total])


@LIGHT
@given(a=boundaries(), b=boundaries())
def test_common_boundaries_against_a_loop(a: torch.Tensor, b: torch.Tensor) -> None:
    i, j = common_boundaries(a, b)
    assert a[i].tolist() == b[j].tolist() == sorted(set(a.tolist()) & set(b.tolist()))
    assert i[0] == j[0] == 0
    if a[-1] == b[-1]:
        assert (int(i[-1]), int(j[-1])) == (len(a) - 1, len(b) - 1)
    assert bool((i.diff() > 0).all())
    assert bool((j.diff() > 0).all())


@pytest.mark.parametrize("first", EXACT)
@pytest.mark.parametrize("second", EXACT)
@pytest.mark.parametrize("text", [TEXTS[8], TEXTS[9], TEXTS[11]])
def test_chunks_between_common_boundaries_are_the_same_text(first: str, second: str, text: str) -> None:
    (a_ids, a), (b_ids, b) = encode(view(first), text), encode(view(second), text)
    i, j = common_boundaries(a, b)
    for p, q, r, s in zip(i.tolist(), i[1:].tolist(), j.tolist(), j[1:].tolist(), strict=False):
        left = b"".join(view(first).surface[t] for t in a_ids[p:q].tolist())
        right = b"".join(view(second).surface[t] for t in b_ids[r:s].tolist())
        assert left == right or (p == 0 and left.lstrip() == right.lstrip())
    if first == second:
        assert len(i) >= len(a.unique())


# ---- maps of vocabularies


@pytest.mark.parametrize("name", EXACT)
def test_map_onto_itself_is_the_identity(name: str) -> None:
    ids, targets = shared(view(name), view(name))
    assert ids.tolist() == targets.tolist() == [i for i, p in enumerate(view(name).pieces) if p]
    found = vocab_map(view(name), view(name))
    weights = torch.randn(len(found.kinds), 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.embed(weights), weights)


def permuted(tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[PreTrainedTokenizerFast, list[int]]:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = described["model"]["vocab"]
    size = len(tokenizer)
    order = list(range(size))
    random.Random(seed).shuffle(order)
    described["model"]["vocab"] = {p: order[i] for p, i in vocab.items()}
    for token in described["added_tokens"]:
        token["id"] = order[token["id"]]
    described["added_tokens"].sort(key=lambda t: t["id"])
    # a token outside the model's vocabulary gets the next free id, so it is put into the vocabulary
    for token in described["added_tokens"]:
        described["model"]["vocab"].setdefault(token["content"], token["id"])
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    roles = {n: getattr(tokenizer, n) for n in names if getattr(tokenizer, n)}
    return fast(Tokenizer.from_str(json.dumps(described)), **roles), order


@pytest.mark.parametrize("name", ["byte-level", "metaspace", "metaspace prepend"])
def test_planted_permutation_is_recovered_exactly(name: str) -> None:
    other, order = permuted(MAKE[name](), seed=1)
    ids, targets = shared(view(name), other)
    assert ids.tolist() == list(range(len(order)))
    assert targets.tolist() == order
    embeddings = torch.randn(len(order), 3, generator=torch.Generator().manual_seed(0))
    found = vocab_map(view(name), other)
    assert torch.equal(found.embed(embeddings), embeddings[order])
    assert set(found.kinds.tolist()) == {Kind.SHARED, Kind.ROLE}
    assert [d.what for d in same_vocabulary(view(name), other)][:1] == ["bytes"]


def test_shared_tokens_have_the_same_bytes_across_kinds() -> None:
    a, d = view("byte-level"), view("metaspace")
    ids, targets = shared(a, d)
    assert bool((ids.diff() > 0).all())
    for i, j in zip(ids.tolist(), targets.tolist(), strict=True):
        assert a.special[i] == d.special[j]
        assert a.special[i] or a.surface[i] == d.surface[j]
    pairs = dict(zip(ids.tolist(), targets.tolist(), strict=True))
    the = a.pieces.index("Ġthe")
    assert d.pieces[pairs[the]] == "▁the"
    assert d.pieces[pairs[a.pieces.index("A")]] == "A"  # what is used in text, not <0x41>
    assert d.pieces[pairs[a.pieces.index(BYTE_CHARACTER[0x20])]] == "▁"
    assert d.pieces[pairs[a.pieces.index(BYTE_CHARACTER[0xE4])]] == "<0xE4>"
    assert pairs[a.roles["eos"]] == d.roles["eos"]
    covered = {b for b, s in zip(d.surface, d.special, strict=True) if not s}
    missing = [i for i in range(len(a.pieces)) if not a.special[i] and i not in pairs]
    assert all(a.surface[i] not in covered for i in missing)


def test_roles_go_by_role_and_the_end_decides() -> None:
    a, d = view("metaspace"), view("byte-level")  # the donor's one special token is both bos and eos
    ids, targets = shared(a, d)
    pairs = dict(zip(ids.tolist(), targets.tolist(), strict=True))
    assert pairs[a.roles["bos"]] == pairs[a.roles["eos"]] == d.roles["eos"]
    assert a.roles["unk"] not in pairs
    back = dict(zip(*(x.tolist() for x in shared(d, a)), strict=True))
    assert back[d.roles["eos"]] == a.roles["eos"]


def test_special_tokens_match_by_literal_without_a_role() -> None:
    made = []
    for base in (byte_level(), metaspace()):
        backend = Tokenizer.from_str(base.backend_tokenizer.to_str())
        backend.add_special_tokens([AddedToken("<|im_start|>", special=True)])
        made.append(fast(backend))
    ids, targets = shared(*made)
    pairs = dict(zip(ids.tolist(), targets.tolist(), strict=True))
    mark = [t.convert_tokens_to_ids("<|im_start|>") for t in made]
    assert pairs[mark[0]] == mark[1]


@pytest.mark.parametrize("name", EXACT)
def test_cut_bytes_are_the_bytes(name: str) -> None:
    known = view(name)
    data = [t.encode() for t in TEXTS if "▁" not in t] + [b"\xe4", b"\xb8\xadab\xff", b" \x80the"]
    for whole, ids in zip(data, cut(known, data), strict=True):
        assert b"".join(known.surface[i] for i in ids) == whole
    assert len(cut(known, [b" the"])[0]) == 1  # its own token, found with its space
    assert cut(known, [b"the"])[0][0] not in [i for i, s in enumerate(known.surface) if s[:1] == b" "]


@pytest.mark.parametrize("donor", EXACT)
@pytest.mark.parametrize("anchor", EXACT)
def test_composed_embedding_is_the_mean_of_the_pieces(anchor: str, donor: str) -> None:
    a, d = view(anchor), view(donor)
    embeddings = torch.randn(len(d.pieces) + 7, 4, generator=torch.Generator().manual_seed(0)).double()
    found = vocab_map(a, d)
    out, kinds = found.embed(embeddings), found.kinds
    for i in range(len(a.pieces)):
        if kinds[i] == Kind.COMPOSED:
            pieces = cut(d, [a.surface[i]])[0]
            assert len(pieces) > 1
            assert b"".join(d.surface[j] for j in pieces) == a.surface[i]
            torch.testing.assert_close(out[i], embeddings[pieces].mean(0))
        elif kinds[i] == Kind.UNKNOWN:
            assert a.special[i]
            assert not out[i].any()
    assert not (kinds == Kind.PARTIAL).any()


def test_a_donor_without_some_characters_is_partial() -> None:
    found = vocab_map(view("byte-level"), view("unigram unk"))
    assert (found.kinds == Kind.PARTIAL).any() or (found.kinds == Kind.UNKNOWN).any()
    whole = view("byte-level").pieces.index(BYTE_CHARACTER[0xE4])
    assert found.kinds[whole] == Kind.UNKNOWN
    assert any("no byte fallback" in reason for reason in view("unigram unk").lossy)


def test_first_pieces_move_probabilities() -> None:
    donor, anchor = view("byte-level"), view("metaspace")
    found = vocab_map(donor, anchor, method="first")
    assert found.rows.tolist() == torch.nonzero(found.kinds != Kind.UNKNOWN)[:, 0].tolist()  # each leads to one token
    assert bool((found.weights == 1).all())
    for row, column in zip(found.rows.tolist(), found.columns.tolist(), strict=True):
        assert donor.special[row] or donor.surface[row].startswith(anchor.surface[column])


def test_embeddings_of_a_map() -> None:
    found = vocab_map(view("byte-level"), view("metaspace"))
    with pytest.raises(ValueError, match="expected a row for each"):
        found.embed(torch.zeros(3, 2))
    with pytest.raises(FrozenInstanceError):
        found.donor_size = 1  # type: ignore[misc]
    half = torch.randn(len(view("metaspace").pieces), 2).bfloat16()
    assert found.embed(half).dtype == torch.bfloat16


# ---- the same tokenizer


def test_same_vocabulary() -> None:
    assert same_vocabulary(metaspace(), metaspace()) == []
    assert same_vocabulary(wordpiece(), wordpiece()) == []
    assert next(iter(same_vocabulary(byte_level(), byte_level(300)))).what == "size"


def test_same_size_with_other_tokens_is_found() -> None:
    base = byte_level().backend_tokenizer
    vocab = json.loads(base.to_str())["model"]["vocab"]
    a, b = "Ġthe", "Ġof"
    vocab[a], vocab[b] = vocab[b], vocab[a]
    other = fast(edited(base, vocab=vocab), eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    (difference,) = same_vocabulary(byte_level(), other)
    assert difference.what == "bytes"
    assert str(difference).startswith("2 ids stand for other bytes")
    assert "' the' and ' of'" in str(difference)


def test_roles_specials_and_cuts_are_compared() -> None:
    base = byte_level().backend_tokenizer
    (role, *_) = same_vocabulary(byte_level(), fast(base, eos_token="<|endoftext|>"))
    assert (role.what, str(role)) == ("role", "the bos token has id 0 and None")
    cut_differently = Tokenizer.from_str(base.to_str())
    cut_differently.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    roles = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    assert [d.what for d in same_vocabulary(byte_level(), fast(cut_differently, **roles))] == ["cut"]
    described = json.loads(base.to_str())
    next(t for t in described["added_tokens"] if t["content"] == "<tool_call>")["special"] = True
    marked = fast(Tokenizer.from_str(json.dumps(described)), **roles)
    assert [d.what for d in same_vocabulary(byte_level(), marked)] == ["special"]


# ---- tokenizers of real models


@pytest.mark.parametrize("name", ["llama-stories260K", "llama-xs279K"])
def test_shared_models(assets: Any, name: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(assets / "models" / name)
    known = byte_view(tokenizer)
    assert (known.kind, known.lossy) == ("metaspace", ())
    assert known.bytes[:3] == [None] * 3
    assert known.bytes[3:259] == [bytes([b]) for b in range(256)]
    for text in TEXTS:
        check_spans(known, text)
    assert not (vocab_map(byte_level(), known).kinds == Kind.UNKNOWN).any()


def test_shared_models_differ(assets: Any) -> None:
    folder = assets / "models"
    a, b = (PreTrainedTokenizerFast.from_pretrained(folder / n) for n in ("llama-stories260K", "llama-xs279K"))
    assert len(a) == len(b)
    found = same_vocabulary(a, b)
    same_ids = a.get_vocab() == b.get_vocab()
    assert ("bytes" in [d.what for d in found]) == (not same_ids)


# ---- size


def large(seed: int, size: int, *, level: bool) -> PreTrainedTokenizerFast:
    """`size` tokens by random merges; half of the merges are those of every seed."""
    letters = [chr(c) for c in range(0x21, 0x7F)] + [" "]
    common, own = random.Random(0), random.Random(seed)
    fallback = [bytes([b]) for b in range(256)]
    seen = dict.fromkeys(letters)
    names, merges = list(letters), []
    while len(names) < size - 259:
        draw = common if len(names) < size // 2 else own
        # low ids are the common ones, as in a trained vocabulary
        left, right = (names[int(len(names) * draw.random() ** 3)] for _ in range(2))
        if len(left) + len(right) <= 14 and left + right not in seen and " " not in right:
            seen[left + right] = None
            names.append(left + right)
            merges.append((left, right))
    write = (lambda t: t.replace(" ", "Ġ")) if level else (lambda t: t.replace(" ", "▁"))
    single = [BYTE_CHARACTER[b[0]] if level else f"<0x{b[0]:02X}>" for b in fallback]
    order = dict.fromkeys([*SPECIALS, *single, *(write(n) for n in names)])
    vocab = {p: i for i, p in enumerate(order)}
    pairs = [(write(a), write(b)) for a, b in merges]
    if level:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(SPECIALS)
    return fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.slow
def test_128k_tokens_on_both_sides() -> None:
    """At most 60 CPU seconds and 4 GB for both vocabularies, the map and a megabyte of text under each."""
    a, d = large(1, 128_000, level=True), large(2, 128_000, level=False)
    text = " ".join(PROSE.split() * 110)[:1_000_000]
    start = time.process_time()
    left, right = byte_view(a), byte_view(d)
    steps = {"views": time.process_time() - start}
    found = vocab_map(left, right)
    steps["map"] = time.process_time() - start
    pieces = [text[i : i + 2000] for i in range(0, len(text), 2000)]
    common = [common_boundaries(spans(left, p), spans(right, p)) for p in pieces]
    steps["spans"] = time.process_time() - start
    embedded = found.embed(torch.ones(len(right.pieces), 64))
    steps["all"] = time.process_time() - start
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    report = {k.name.lower(): float((found.kinds == k).double().mean()) for k in Kind}
    print(len(left.pieces), len(right.pieces), len(text), steps, f"{gigabytes:.2f} GB", report)  # noqa: T201
    assert min(len(left.pieces), len(right.pieces)) > 127_000
    assert steps["all"] <= 60
    assert gigabytes <= 4
    assert report["shared"] > 0.4
    assert report["composed"] > 0.3
    assert report["unknown"] == 0
    assert len(common) == len(pieces)
    torch.testing.assert_close(embedded, torch.ones_like(embedded))
