"""End to end: what a merge of two tokenizers writes is never garbled; llama.cpp reads the same tokens in a GGUF file.

The check against llama.cpp needs `pip install gguf xllamacpp` and is skipped without.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model
from test_result_tokenizer import BOTH, CODE, PROSE, trained, two_models
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import polymerge
from polymerge.align.token_bytes import byte_view
from polymerge.align.union_vocab import union_tokenizer
from polymerge.calibrate.tokenizer import load_tokenizer
from polymerge.demo.corpus import write_heldout
from polymerge.demo.run import EXPERTS
from polymerge.errors import CheckpointError
from polymerge.recipe import parse

ROOT = Path(__file__).parent.parent
PROMPTS = ["The method returns", "def f(x):\n    return", "1234567 0.5e-3", "🦊 and 👩‍👩‍👧 中文"]
TEXTS = [
    *PROMPTS, PROSE, CODE, "It's the others' cat; they're here, aren't they?",
    "class A:\n\tdef f(self): ...\n\n\n", "x", "",
    "1 12 123 1234 12345 1,000,000.00 0xFF ½ ٣",
    "🎉🎉 👨‍👩‍👧‍👦 ❤️ 🇫🇷", "中文字符 日本語テキスト 한국어",
    "Кириллица и العربية हिन्दी",
    " ", "   leading and trailing   ", "\t\t tabs \t", "\n\n  \n a\r\n\r\n b",
    "naïve café e\u0301 ﬁ Ünïcödé", "a_b-c+d=e==f!=g//h**i",
    "    if x:\n        return [i for i in range(10)]  # done\n",
    "mixed中english🦊text123αβγ", "A\u00a0B\u2003C\u200bD",
]  # fmt: skip


def recipe(models, texts, **changes):
    return parse({
        "method": "fold", "anchor": "prose", "size": {"params": "2x"}, "dtype": "float32",
        "experts": {k: {"model": str(m), "text": str(texts[k])} for k, m in models.items()},
        "fold": {"length": 32, "tokens": 1280, "refine": 2, "trials": False}, **changes,
    })  # fmt: skip


def check_writing(folder):
    """Greedy and sampled: tokens in are tokens out, and the text is exactly the bytes of its tokens."""
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    view = byte_view(tokenizer)
    padding = list(range(len(view.pieces), model.config.vocab_size))  # an untrained expert says these as well
    for n, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        torch.manual_seed(n)
        out = model.generate(
            ids, max_new_tokens=24, min_new_tokens=24, do_sample=bool(n % 2), pad_token_id=0, suppress_tokens=padding
        )[0]
        assert out[: ids.shape[1]].tolist() == ids[0].tolist()
        assert len(out) == ids.shape[1] + 24
        data = b"".join(view.surface[i] for i in out.tolist())
        written = tokenizer.decode(out)
        dummy = " " * (data[:1] == b" " and not prompt.startswith(" "))  # SentencePiece's, before a text
        assert dummy + written == data.decode(errors="replace")
        assert written.startswith(prompt)
        yield written, data


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return two_models(tmp_path_factory.mktemp("generation"))


def merged(pair, asked):
    names = ("prose", "code")
    wanted = recipe({k: pair / k for k in names}, {k: pair / f"{k}.txt" for k in names}, tokenizer=asked)
    out = pair / f"out-{asked}"
    return out if out.exists() else polymerge.merge(wanted, out).out


@pytest.mark.parametrize("asked", [None, "code", "union"])
def test_a_merge_of_two_tokenizers_writes_its_own_tokens(pair, asked):
    assert len(list(check_writing(merged(pair, asked)))) == len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "union"])
def test_trained_experts_write_whole_characters(tmp_path, asked):
    """The shipped prose expert and a random one with another tokenizer: what is learned stays text."""
    write_heldout(tmp_path)
    texts = {k: tmp_path / f"{k}.txt" for k in ("prose", "code")}
    found = load_tokenizer(EXPERTS["prose"]).backend_tokenizer
    other = trained(
        texts["code"].read_text("utf-8")[:200_000], 600, "</s>", split=found.pre_tokenizer, eos_token="</s>"
    )
    save_tiny_model(tmp_path / "code", "gpt_neox", vocab_size=len(other), eos_token_id=0, max_position_embeddings=512)
    other.save_pretrained(tmp_path / "code")
    models = {"prose": EXPERTS["prose"], "code": tmp_path / "code"}
    wanted = recipe(models, texts, tokenizer=asked, fold={"tokens": "12k", "length": 64, "refine": 5})
    written = list(check_writing(polymerge.merge(wanted, tmp_path / "out").out))
    for text, _ in written[:3]:
        assert "\ufffd" not in text
    assert sum(c.isalpha() or c.isspace() for c in written[0][0]) > 0.8 * len(written[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["stories", "prose"])
def test_sentencepiece_and_byte_level_together(assets, tmp_path, anchor):
    write_heldout(tmp_path)
    models = {"prose": EXPERTS["prose"], "stories": assets / "models/llama-stories260K"}
    texts = {"prose": tmp_path / "prose.txt", "stories": assets / "text/tinystories.jsonl"}
    wanted = recipe(models, texts, anchor=anchor, size="union", fold={"tokens": "12k", "length": 64, "refine": 5})
    written = list(check_writing(polymerge.merge(wanted, tmp_path / "out").out))
    assert "\ufffd" not in written[0][0]


# ------------------------------------------------------------------------------------------ llama.cpp

ASK = """
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port, params.cpuparams.n_threads = sys.argv[1], 128, 1, 0, 1
server = xllamacpp.Server(params)
def ask(path, **data):
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(data).encode(), kind)
    return json.load(urllib.request.urlopen(request, timeout=60))
asked = json.load(sys.stdin)
tokens = [ask("/tokenize", content=t, add_special=False, parse_special=True)["tokens"] for t in asked["texts"]]
texts = [ask("/detokenize", tokens=t)["content"] for t in asked["tokens"]]
written = [ask("/completion", prompt=p, n_predict=12, temperature=0)["content"] for p in asked["prompts"]]
print("ANSWER" + json.dumps([tokens, texts, written]))
"""


@pytest.fixture(scope="module")
def to_gguf():
    """examples/to_gguf.py as a module."""
    where = importlib.util.spec_from_file_location("to_gguf", ROOT / "examples" / "to_gguf.py")
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    return module


def check_llama_cpp(to_gguf, folder, file):
    """llama.cpp cuts every text as transformers does, puts it together again, and goes on in the same way."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    to_gguf.export(folder, file)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    expected = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    asked = json.dumps({"texts": TEXTS, "tokens": expected, "prompts": PROMPTS})
    run = subprocess.run(
        [sys.executable, "-c", ASK, str(file)], input=asked, capture_output=True, text=True, check=False
    )
    assert "ANSWER" in run.stdout, run.stderr[-2000:]
    tokens, texts, written = json.loads(run.stdout.split("ANSWER")[1])
    for text, mine, theirs in zip(TEXTS, expected, tokens, strict=True):
        assert theirs == mine, text
    assert texts == TEXTS
    for prompt, theirs in zip(PROMPTS, written, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        if "\ufffd" not in theirs:  # broken bytes are told in different ways
            assert tokenizer.decode(out, skip_special_tokens=True).startswith(theirs)


@pytest.mark.parametrize("asked", [None, "union"])
def test_llama_cpp_reads_a_merge_with_the_same_tokens(pair, to_gguf, tmp_path, asked):
    check_llama_cpp(to_gguf, merged(pair, asked), tmp_path / "model.gguf")


@pytest.mark.parametrize("digits", [3, 1])
@pytest.mark.parametrize("whole", [True, False])
def test_llama_cpp_reads_unions_of_other_ways_to_split(to_gguf, tmp_path, digits, whole):
    """Those of Llama 3 and Qwen2, with and without their rule that a whole known word skips the merges."""
    pattern = to_gguf.LLAMA3 if digits == 3 else to_gguf.LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    one, other = (trained(t, n, "<|end|>", split=split, eos_token="<|end|>") for t, n in ((PROSE, 330), (CODE, 360)))
    both = union_tokenizer("one", ignoring(one, whole), {"other": ignoring(other, whole)})
    save_tiny_model(tmp_path / "model", vocab_size=len(both), eos_token_id=0)
    both.save_pretrained(tmp_path / "model")
    if digits == 1 and whole:
        with pytest.raises(CheckpointError, match=r"llama\.cpp has no rule"):
            to_gguf.rule(both)
        return
    check_llama_cpp(to_gguf, tmp_path / "model", tmp_path / "model.gguf")


def ignoring(tokenizer, whole):
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    facts["model"]["ignore_merges"] = whole
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts)), eos_token="<|end|>")


def test_a_split_that_gguf_has_no_name_for_is_refused(to_gguf):
    """The shipped experts' own: line breaks with the indentation after them."""
    with pytest.raises(CheckpointError, match=r"llama\.cpp has no rule that splits texts as"):
        to_gguf.rule(load_tokenizer(EXPERTS["prose"]))
    assert to_gguf.rule(BOTH) == "gpt-2"
