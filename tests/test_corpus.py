"""The demo's two text domains: what is taken from a source file, and that nothing held out is trained on."""

import ast
import re
from pathlib import Path

import pytest

import polymerge.demo
from polymerge.demo import corpus as module
from polymerge.demo.corpus import (
    DOMAINS,
    corpus,
    docstrings,
    family,
    is_heldout,
    strip_docstrings,
    write_heldout,
)

EXPERTS = Path(polymerge.demo.__file__).parent / "experts"
ANY_TEXT = 'def f(x):\n    if x:\n\treturn  "é 𝄞"\r\n\n\n   # two  blanks, <|pad|>, \x00 \u2028 '

SOURCE = '''"""Module text."""
# a comment stays: é
import os

class A: "one line"

class B:
    r"""Only a docstring,

    two paragraphs."""

async def f(x):
    """
    Doc of f.
    """  # a comment behind it

    y = """no docstring"""
    return y, "ü"; "neither"
'''


def paragraphs(text: str) -> list[str]:
    found = (" ".join(paragraph.split()) for paragraph in re.split(r"\n[ \t]*\n", text))
    return [paragraph for paragraph in found if len(paragraph) >= module.SHORTEST_REPEAT]


def test_docstrings_are_removed_and_the_rest_stays() -> None:
    stripped = strip_docstrings(SOURCE)
    tree = ast.parse(stripped)
    assert not any(
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.AsyncFunctionDef)
    )
    assert stripped.startswith("# a comment stays: é\nimport os")
    assert "class A: pass" in stripped
    assert "class B:\n    pass" in stripped
    assert '    y = """no docstring"""\n    return y, "ü"; "neither"' in stripped
    assert "Doc of f" not in stripped


def test_stripping_changes_no_other_statement() -> None:
    for name, source in module._sources("train")[::25]:
        assert _bare(strip_docstrings(source)) == _bare(source), name


def _bare(source: str) -> str:
    """The syntax tree without docstrings and without the `pass` that may stand for one."""
    tree = ast.parse(source)
    for owner, _ in list(module._docstring_nodes(tree)):
        del owner.body[0]
    for node in ast.walk(tree):
        if isinstance(node, module._DocstringOwner) and node.body and isinstance(node.body[0], ast.Pass):
            del node.body[0]
    return ast.dump(tree)


def test_docstrings_are_dedented_long_and_mostly_prose() -> None:
    prose = (
        "Tell what this function is for,\n    in two lines that are long enough to count as prose; "
        + "word " * 12
        + "end."
    )
    examples = "Double a number; this text is certainly long enough to be taken.\n" + "    >>> f(1)\n    2\n" * 8
    source = f'def f():\n    """{prose}"""\ndef g():\n    """{examples}"""\ndef h():\n    """Short."""\n'
    assert docstrings(source) == [prose.replace("\n    ", "\n")]


def test_twins_are_one_family() -> None:
    assert {family(name) for name in ("decimal", "_pydecimal")} == {"decimal"}
    assert {family(name) for name in ("datetime", "_pydatetime", "_datetime")} == {"datetime"}
    assert family("email.mime.text") == "email"


def test_the_rule_is_fixed() -> None:
    """The shipped experts were trained on its train side: it must never change."""
    assert [
        name for name in ("argparse", "typing", "urllib", "zoneinfo", "topic strings") if not is_heldout(name)
    ] == []
    assert [name for name in ("asyncio", "email", "json", "idlelib", "topic for") if is_heldout(name)] == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_heldout_is_large_and_apart(domain: module.Domain) -> None:
    train, heldout = corpus(domain, "train"), corpus(domain, "heldout")
    assert sum(len(text.encode()) for text in heldout) >= 250_000
    assert sum(len(text.encode()) for text in train) >= 1_300_000
    seen = frozenset(paragraph for text in train for paragraph in paragraphs(text))
    assert [paragraph for text in heldout for paragraph in paragraphs(text) if paragraph in seen] == []


def test_no_domain_trains_on_a_held_out_module() -> None:
    """A held-out module's docstrings, cut out of its code, are not in the prose that is trained on."""
    seen = frozenset(paragraph for text in corpus("prose", "train") for paragraph in paragraphs(text))
    held_out = [source for _, source in module._sources("heldout")]
    found = [paragraph for source in held_out for text in docstrings(source) for paragraph in paragraphs(text)]
    assert len(found) > 500
    assert [paragraph for paragraph in found if paragraph in seen] == []


def test_order_is_by_family_then_module() -> None:
    assert "_abc_invalidation_counter" in corpus("code", "heldout")[0]  # _py_abc, the twin of abc


def test_held_out_files(tmp_path: Path) -> None:
    paths = write_heldout(tmp_path / "text")
    assert list(paths) == ["prose", "code"]
    for domain in DOMAINS:
        assert paths[domain].name == f"{domain}.txt"
        assert paths[domain].read_text(encoding="utf-8") == "\n\n\n".join(corpus(domain, "heldout")) + "\n"


@pytest.mark.parametrize("name", ["prose-llama", "code-neox"])
def test_shipped_expert(name: str) -> None:
    """Small, loads as it lies, and its tokenizer gives back any text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = EXPERTS / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(ANY_TEXT)["input_ids"]) == ANY_TEXT
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(folder).config.vocab_size


def test_shipped_experts_share_one_tokenizer() -> None:
    assert len({(EXPERTS / name / "tokenizer.json").read_bytes() for name in ("prose-llama", "code-neox")}) == 1
