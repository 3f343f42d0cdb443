"""Texts: reading, splitting without overlap, and rows whose bytes are exact."""

import copy
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import polymerge
from polymerge.calibrate.files import cut, read_sources
from polymerge.calibrate.packing import token_bytes
from polymerge.calibrate.texts import PARTS, Skill, adds_bos, first, pack, pairs, read_skill, shared_documents
from polymerge.calibrate.tokenizer import chat_of
from polymerge.errors import TextError


def prose(lines, seed=0):
    """Lines of random words, no two alike."""
    rng = np.random.default_rng(seed)
    words = ["fold", "union", "heal", "größe", "層", "🙂", "width", "layer", "the", "of"]
    return "".join(f"{i} {' '.join(rng.choice(words, 12))}\n" for i in range(lines))


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(prose(4000), encoding="utf-8")
    return tmp_path / "book.txt"


def parts(skill):
    return [getattr(skill, part) for part in PARTS]


def documents_of(skill):
    return [document for part in parts(skill) for document in part]


def test_split_is_80_10_10_and_loses_nothing(book):
    skill = read_skill("book", [book])
    text = book.read_text(encoding="utf-8")
    sizes = [sum(map(len, part)) for part in parts(skill)]
    assert sum(sizes) == len(text)
    assert np.allclose(np.array(sizes) / len(text), [0.8, 0.1, 0.1], atol=0.01)
    assert Counter("".join(documents_of(skill)).split("\n")) == Counter(text.split("\n"))
    assert 1900 < np.median([len(d) for d in skill.calibration]) < 2200
    assert all(document.endswith("\n") for part in parts(skill) for document in part)


def test_parts_never_overlap_even_with_repeats(tmp_path):
    records = [{"text": f"story {i % 50} " + "word " * 20} for i in range(400)]
    file = tmp_path / "s.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    skill = read_skill("s", [file, file])
    everything = documents_of(skill)
    assert len(everything) == len(set(everything)) == 50
    assert all(parts(skill))


def test_split_depends_on_text_and_seed_only(book, tmp_path):
    same = tmp_path / "sub/other-name.txt"
    same.parent.mkdir()
    same.write_bytes(book.read_bytes())
    one, two = read_skill("a", [book]), read_skill("b", [same.parent])
    assert parts(one) == parts(two)
    assert one.digest() == two.digest()
    other = read_skill("a", [book], seed=1)
    assert one.digest() != other.digest()
    assert sorted(documents_of(one)) == sorted(documents_of(other))


def test_split_is_the_same_in_every_process(book):
    code = "import sys, pathlib; from polymerge.calibrate.texts import read_skill;"
    code += "print(read_skill('a', [pathlib.Path(sys.argv[1])]).digest())"
    package = str(Path(next(iter(polymerge.__path__))).parent)
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": package}
        done = subprocess.run(
            [sys.executable, "-c", code, book], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == read_skill("a", [book]).digest()


def test_record_for_the_lock(book):
    record = read_skill("book", [book], seed=3).split_record()
    assert record["seed"] == 3
    assert record["files"][0]["name"] == "book.txt"
    assert str(book.parent) not in json.dumps(record)
    assert sum(p["characters"] for p in record["parts"].values()) == record["files"][0]["characters"]
    assert set(record["parts"]) == set(PARTS)


def test_leak_between_skills_is_seen(book):
    one, two = read_skill("a", [book]), read_skill("b", [book], seed=1)
    assert shared_documents(one, one) == 0
    assert shared_documents(one, two) > 0


def test_folder_is_walked_and_only_text_is_taken(tmp_path):
    (tmp_path / "src/deep").mkdir(parents=True)
    (tmp_path / "src/a.py").write_text(prose(100, 1))
    (tmp_path / "src/deep/b.md").write_text(prose(100, 2))
    (tmp_path / "src/deep/c.json").write_text(json.dumps([{"text": prose(30, 3)}]))
    (tmp_path / "src/package.json").write_text('{"name": "' + "x" * 80 + '"}')
    (tmp_path / "src/weights.bin").write_bytes(b"\xff\xfe\x00" * 100)
    (tmp_path / "src/nul.dat").write_bytes(b"a\0b" * 100)
    (tmp_path / "src/empty.py").write_text("")
    (tmp_path / "src/table.csv").write_text("x,y\n1,2\n")  # text, as all that lies in a folder of code
    (tmp_path / "src/.hidden").write_text(prose(10, 4))
    skill = read_skill("src", [tmp_path / "src"])
    names = [f["name"] for f in skill.split_record()["files"]]
    assert names == ["src/a.py", "src/deep/b.md", "src/deep/c.json", "src/package.json", "src/table.csv"]


def test_in_a_folder_of_code_json_without_records_is_text(tmp_path):
    contents = {"a.json": "[1, 2, 3]", "b.json": "// a comment\n{}", "c.jsonl": "no JSON", "d.json": "[" * 100_000}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "e.json").write_text(json.dumps([{"text": "a record"}]))
    found = list(read_sources([tmp_path], "text"))
    assert [s.records[0] for s in found] == [*contents.values(), "a record"]
    with pytest.raises(TextError, match="not JSON"):
        list(read_sources([tmp_path / "d.json"], "text"))
    (tmp_path / "e.json").write_text(json.dumps([{"txt": "a record"}]))
    with pytest.raises(TextError, match="no field 'text'"):
        list(read_sources([tmp_path], "text"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="other: none of its 1 files is text"):
        list(read_sources([other], "text"))


def test_little_text_is_cut_finer(tmp_path):
    (tmp_path / "t.txt").write_text(prose(120))
    skill = read_skill("t", [tmp_path / "t.txt"])
    assert len(documents_of(skill)) >= 30
    assert all(len(part) >= 2 for part in parts(skill))


def test_json_kinds(tmp_path):
    stories = [f"story {i} " + "word " * 30 for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"body": s}) for s in stories))
    (tmp_path / "a.json").write_text(json.dumps([{"body": s} for s in stories]))
    for name, known in (("a.ndjson", "a.jsonl"), ("b.JSONL", "a.jsonl"), ("b.Json", "a.json")):
        (tmp_path / name).write_bytes((tmp_path / known).read_bytes())
    one, *others = (
        read_skill("a", [tmp_path / name], field="body")
        for name in ("a.jsonl", "a.json", "a.ndjson", "b.JSONL", "b.Json")
    )
    assert all(parts(other) == parts(one) for other in others)
    assert sorted(documents_of(one)) == sorted(stories)


def test_prompt_and_answer(tmp_path):
    records = [{"prompt": f"{i} + {i + 1} = " + " " * 20, "answer": f"{2 * i + 1}\u2028"} for i in range(60)]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    skill = read_skill("sums", [file])
    assert sorted(documents_of(skill)) == sorted(r["prompt"] + r["answer"] for r in records)
    assert pairs([file]) == [(r["prompt"], r["answer"]) for r in records]


def conversation(i):
    said = [("system", "Be brief."), ("user", f"What is {i} + {i}? " + "Think. " * 8), ("assistant", f"{2 * i}")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def test_question_and_answer(tmp_path):
    records = [{"question": f"What is {i} + {i + 1}?" + " " * 20, "answer": f"{2 * i + 1}"} for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert pairs([tmp_path / "sums.jsonl"]) == [(r["question"] + "\n", r["answer"]) for r in records]
    assert f"{records[7]['question']}\n15" in documents_of(read_skill("sums", [tmp_path / "sums.jsonl"]))


def test_conversations_are_written_by_the_chat_template(tmp_path, tokenizer):
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps(conversation(i)) for i in range(60)))
    with pytest.raises(TextError, match=r"line 1 holds `messages`, but the tokenizer has no chat template"):
        read_skill("chat", [file], chat=chat_of(tokenizer))
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    skill = read_skill("chat", [file], chat=chat_of(mine))
    expected = f"<|system|>Be brief.\n<|user|>What is 7 + 7? {'Think. ' * 8}\n<|assistant|>14\n"
    assert expected in documents_of(skill)
    assert len(documents_of(skill)) == 60
    mine.chat_template = "{{ raise_exception('two users') }}"
    with pytest.raises(TextError, match=r"line 1: the chat template does not take its `messages` \(two users\)"):
        read_skill("chat", [file], chat=chat_of(mine))


def test_a_conversation_has_no_bos_where_its_row_has_one(tokenizer):
    leads = copy.deepcopy(tokenizer)
    leads.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    leads.bos_token = "<|endoftext|>"
    assert chat_of(leads)([{"role": "user", "content": "hi"}]) == "<|endoftext|>hi"
    leads.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", leads.bos_token_id)]
    )
    assert chat_of(leads)([{"role": "user", "content": "hi"}]) == "hi"


def test_prompt_with_completion_and_compressed_files(tmp_path):
    records = [{"prompt": f"{i} + {i + 1} = " + " " * 20, "completion": f"{2 * i + 1}"} for i in range(60)]
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / "sums.jsonl").write_text(lines)
    (tmp_path / "sums.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    plain, packed = (read_skill("sums", [tmp_path / name]) for name in ("sums.jsonl", "sums.jsonl.gz"))
    assert parts(plain) == parts(packed)
    assert pairs([tmp_path / "sums.jsonl.gz"]) == [(r["prompt"], r["completion"]) for r in records]
    (tmp_path / "broken.txt.gz").write_bytes(gzip.compress(lines.encode())[:-20])
    with pytest.raises(TextError, match=r"broken\.txt\.gz: not readable \(Compressed file ended"):
        read_skill("sums", [tmp_path / "broken.txt.gz"])


def test_pairs_of_a_plain_text_are_none(book):
    assert pairs([book]) == []


BAD = [
    ("t.txt", b"", "is empty"),
    ("t.txt", b" \n\t\n", "is empty"),
    ("t.txt", b"good text\nbad \xe9 byte", r"not UTF-8 at byte 14 \(0xe9\); expected UTF-8 text\. Convert"),
    ("t.txt", b"short\n", r"1 distinct documents with 6 characters found; 3 and 1000 are needed"),
    ("t.jsonl", b'{"txt": "x"}', r"line 1 has no field 'text' .*\['txt'\]; did you mean field 'txt'\?"),
    ("t.jsonl", b'{"text": "x"}\n{"zz": 1}', r"line 2 has no field 'text'.*set `field` to one of them"),
    ("t.jsonl", b'{"text": 3}', "field 'text' is of type int; expected text"),
    ("t.jsonl", b'{"text": "x"', "line 1: not JSON"),
    ("t.jsonl", b"[1]", "line 1 is a JSON list; expected an object"),
    ("t.json", b'{"text": "x"}', "JSON dict; expected a list of objects"),
    ("t.jsonl", b'{"text": "\\ud800"}', "half a surrogate pair"),
    (
        "t.json",
        b'{"text": "x"}\n{"text": "y"}',
        r"not JSON \(Extra data.*; where each line is an object, call the .*jsonl",
    ),
    ("t.csv", b"text\nx\n", r"is a table; expected .*`pandas\.read_csv\(FILE\)\.to_json.*set `field` to the column"),
    ("t.TSV.gz", b"", r"is a table.*read_csv\(FILE, sep='\\t'\)"),
    ("t.parquet", b"PAR1\xff", r"is a table.*read_parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        read_skill("prose", [tmp_path / name])
    assert str(caught.value).startswith("text of 'prose': ")
    assert "\n" not in str(caught.value)


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(TextError, match=r"absent\.txt: does not exist; expected a text file or a folder"):
        read_skill("a", [tmp_path / "absent.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match="an empty folder"):
        read_skill("a", [tmp_path / "empty"])
    with pytest.raises(TextError, match="no text files given"):
        read_skill("a", [])


@given(st.text(alphabet="ab\n é🙂", max_size=300), st.integers(1, 40))
def test_cut_is_lossless_and_bounded(text, block):
    pieces = list(cut(text, block))
    assert "".join(pieces) == text
    assert all(0 < len(piece) < 3 * block for piece in pieces)


def trained_tokenizer(text, **special):
    """A byte-level BPE with merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=sorted(special.values()),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def real_bytes(tokenizer, ids):
    """Reference: the bytes that byte-level tokens spell, one character of the token each."""
    special = set(tokenizer.all_special_ids)
    return sum(len(tokenizer.convert_ids_to_tokens(i)) for i in ids if i not in special)


def test_bytes_are_exact_with_merges(book):
    documents = read_skill("book", [book]).test
    tokenizer = trained_tokenizer(book.read_text(encoding="utf-8")[:20000], eos_token="</s>")
    rows = pack(tokenizer, documents, 64)
    # A character cut by a row's edge is counted whole on one side: at most 3 bytes a row.
    expected = sum(real_bytes(tokenizer, row[1:].tolist()) for row in rows.tokens)
    assert abs(rows.bytes - expected) <= 3 * len(rows.tokens)
    for text in documents[:20]:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = token_bytes(text, np.array(found["offset_mapping"]))
        assert spans.sum() == len(text.encode())
        tokens = [real_bytes(tokenizer, [i]) for i in found["input_ids"]]
        assert np.abs(np.cumsum(spans) - np.cumsum(tokens)).max() <= 3


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_bytes_of_any_text_sum_to_its_length(text):
    offsets = test_bytes_of_any_text_sum_to_its_length.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    spans = token_bytes(text, np.array(offsets))
    assert spans.sum() == len(text.encode())
    assert (spans >= 0).all()


@pytest.fixture(autouse=True, scope="module")
def _give_tokenizer(tokenizer):
    test_bytes_of_any_text_sum_to_its_length.tokenizer = tokenizer


@pytest.mark.parametrize(
    ("text", "offsets", "expected"),
    [
        ("abc", [(0, 1), (1, 3)], [1, 2]),
        ("é🙂", [(0, 1), (0, 1), (1, 2), (1, 2)], [2, 0, 4, 0]),  # tokens that share a character
        (" a  b ", [(1, 2), (4, 5)], [2, 4]),  # blanks the tokenizer trimmed or dropped
        ("abc", [(0, 2), (0, 0), (2, 3)], [2, 0, 1]),  # a token that stands for no text
    ],
)
def test_bytes_from_offsets(text, offsets, expected):
    assert token_bytes(text, np.array(offsets)).tolist() == expected


def test_a_character_counts_at_its_first_token(tokenizer):
    rows = pack(tokenizer, ["a層"], 2)  # tokens: a, and three for 層
    assert rows.tokens.shape == (2, 2)
    assert rows.bytes == 3  # row 0 scores 層's first token; row 1 its third


def test_rows_are_the_stream(tokenizer):
    documents = ["hello ", "wörld", "again"]
    eos = tokenizer.eos_token_id
    stream = []
    for document in documents:
        stream += [*([eos] if stream else []), *tokenizer(document)["input_ids"]]
    rows = pack(tokenizer, documents, 4)
    assert rows.tokens.dtype == torch.int64
    assert rows.tokens.flatten().tolist() == stream[: len(stream) // 4 * 4]
    assert len(rows.tokens) == len(stream) // 4


def test_ascii_bytes_are_tokens_without_separators(tokenizer):
    rows = pack(tokenizer, ["abc", "defgh"], 3)  # abc | _de | fgh, _ the separator
    assert rows.tokens.tolist()[1][0] == tokenizer.eos_token_id
    assert rows.bytes == 6
    rows = pack(tokenizer, ["ab", "cdefgh"], 3)  # ab_ | cde | fgh
    assert rows.bytes == 5


def test_limit(tokenizer):
    documents = [prose(10, i) for i in range(200)]
    whole = pack(tokenizer, documents, 32)
    some = pack(tokenizer, documents, 32, limit=7)
    assert torch.equal(some.tokens, whole.tokens[:7])
    assert len(pack(tokenizer, documents[:1], 32, limit=10**6).tokens) < 10**3


def test_the_first_tokens_of_documents(tokenizer):
    documents = ["one two three", "", "four five six seven"]
    count = [len(tokenizer(d)["input_ids"]) for d in documents]
    assert first(documents, tokenizer, 10_000) == ["one two three", "four five six seven"]
    whole, part = first(documents, tokenizer, count[0] + 2)
    assert whole == documents[0]
    assert documents[2].startswith(part)
    assert len(part) < len(documents[2])
    assert first(documents, tokenizer, count[0]) == documents[:1]
    assert first(documents, tokenizer, 0) == []


def test_bos_starts_rows_and_documents():
    tokenizer = trained_tokenizer("q", bos_token="<s>", eos_token="</s>")
    bos = tokenizer.bos_token_id
    rows = pack(tokenizer, ["abcdef", "xyz"], 5, bos=True)
    assert (rows.tokens[:, 0] == bos).all()
    assert tokenizer.decode(rows.tokens.flatten()) == "<s>abcd<s>ef<s>x"
    assert rows.bytes == 7
    assert not adds_bos(tokenizer)


def test_bos_is_noticed():
    from tokenizers.processors import TemplateProcessing

    tokenizer = trained_tokenizer("abc", bos_token="<s>")
    special = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    assert adds_bos(tokenizer)


def test_pack_refuses(tokenizer):
    with pytest.raises(TextError, match="gives 5 tokens; one row needs 6"):
        pack(tokenizer, ["12345"], 6)
    with pytest.raises(TextError, match="length of 2 or more"):
        pack(tokenizer, ["12345"], 1)
    with pytest.raises(TextError, match="no bos token"):
        pack(tokenizer, ["12345"], 4, bos=True)


def test_digest_tells_documents_apart():
    assert Skill("a", ["xy"], [], []).digest() != Skill("a", ["x", "y"], [], []).digest()
    assert Skill("a", ["x"], ["y"], []).digest() != Skill("a", ["x", "y"], [], []).digest()


def test_shared_texts(assets):
    skill = read_skill("stories", [assets / "text/tinystories.jsonl"])
    assert len(documents_of(skill)) > 1000
    assert len(pairs([assets / "text/gsm8k-test.jsonl"], field="question")) == 0
