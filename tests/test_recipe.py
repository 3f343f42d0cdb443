"""Recipes: what a file may say, and the one line that answers what it may not."""

from dataclasses import fields
from pathlib import Path

import pytest

from polymerge import recipe as recipes
from polymerge._quantities import Budget
from polymerge.errors import RecipeError
from polymerge.heal import Heal
from polymerge.recipe import Expert, Fold, Recipe, Size, Union, parse, read, read_with_text

TEXT = """\
method: fold
anchor: prose
experts:
  prose: {model: experts/prose, text: [text/prose.txt]}
  code:  {model: experts/code, text: text/code.txt, field: body}
size: {params: 1.5x}
heal: {tokens: 400k, lr: 1e-4}
fold: {tokens: 32k, ridge: 1e-3}
dtype: bfloat16
seed: 3
"""


def data(**changes):
    plain = {
        "method": "fold",
        "anchor": "a",
        "experts": {"a": {"model": "a", "text": ["a.txt"]}, "b": {"model": "b", "text": ["b.txt"]}},
    }
    return {**plain, **changes}


def test_a_whole_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    recipe, text = read_with_text(path)
    assert read(path) == recipe
    assert text == TEXT
    assert list(recipe.experts) == ["prose", "code"]  # the order of the file
    assert recipe.experts["prose"].model == tmp_path / "experts/prose"
    assert recipe.experts["code"].text == [tmp_path / "text/code.txt"]
    assert recipe.experts["code"].field == "body"
    assert recipe.size == Size(params=Budget(times=1.5))
    assert recipe.heal == Heal(tokens=400_000, lr=1e-4)  # YAML reads 1e-4 as text
    assert parse(data(heal={"text": None, "lr": "1e-3"})).heal == Heal(lr=1e-3)  # left empty: the default
    assert (recipe.fold.tokens, recipe.fold.ridge, recipe.seed) == (32_000, 1e-3, 3)


def test_bases_are_relative_to_the_recipe(tmp_path):
    asked = data(method="task_vector_transport", options={"bases": ["base", "/there"], "alpha": 0.5})
    found = parse(asked, folder=tmp_path).options
    assert found == {"bases": (str(tmp_path / "base"), "/there"), "alpha": 0.5}


def test_absolute_paths_stay(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT.replace("experts/prose", "/elsewhere/prose"))
    assert read(path).experts["prose"].model == Path("/elsewhere/prose")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("400k", 400_000), ("1.5M", 1_500_000), ("2b", 2 * 10**9), ("1_000", 1000), (7, 7), ("7", 7)],
)
def test_counts(value, expected):
    assert recipes.count(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("1x", 1000), ("1.5x", 1500), (" 2X ", 2000), ("900k", 900_000), (12, 12)]
)
def test_budgets(value, expected):
    assert recipes.budget(value).resolve(1000) == expected


WHOLE = Fold()
LEAN = Fold(tokens=32_000, refine=0, trials=False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, WHOLE),
        ({"fold": {}}, WHOLE),
        ({"fold": "lean"}, LEAN),
        ({"heal": {"tokens": "400k"}}, WHOLE),
        ({"heal": {}}, LEAN),  # healing is long by default
        ({"heal": {"tokens": recipes.LONG}}, LEAN),
        ({"heal": {}, "fold": {"refine": 60}}, LEAN.model_copy(update={"refine": 60})),
        ({"heal": {}, "fold": "whole"}, WHOLE),
        ({"heal": {}, "fold": Fold(tokens=64_000)}, Fold(tokens=64_000)),  # given whole, from Python
        ({"heal": {}, "method": "linear"}, WHOLE),  # which calibrates by these tokens
    ],
)
def test_a_fold_is_lean_where_long_healing_follows(changes, expected):
    assert parse(data(**changes)).fold == expected


@pytest.mark.parametrize(
    ("fold", "heal", "wanted"),
    [
        ({}, None, 128_000),
        ("lean", None, 32_000),  # nothing else reads them
        ("lean", {"tokens": "100k"}, 50_000),  # half of what healing reads of two experts
        ("lean", {"tokens": "1.7M"}, 128_000),
        ({"tokens": "256k"}, {"tokens": "1.7M"}, 256_000),
    ],
)
def test_texts_wanted_for_fold_and_healing(fold, heal, wanted):
    assert parse(data(fold=fold, heal=heal)).wanted == wanted


@pytest.mark.parametrize("key", ["tokenizer", "size", "family", "heal", "fold", "union", "options", "dtype", "seed"])
def test_a_key_left_empty_is_not_given(key):
    assert parse(data(**{key: None})) == parse(data())


def test_a_key_left_empty_within_another_is_not_given():
    expert = {"model": "a", "text": None, "field": None, "write": "40k"}
    found = parse(data(experts={"a": expert}, fold={"tokens": None}, union={"alpha": None}, heal={}))
    assert found.experts["a"] == Expert(model=Path("a"), write=40_000)
    assert (found.fold, found.union) == (LEAN, Union())


def test_short_names_and_counts():
    assert [parse(data(dtype=d)).dtype for d in ("bf16", "fp16", "fp32")] == ["bfloat16", "float16", "float32"]
    assert parse(data(fold={"refine": "1k"})).fold.refine == 1000


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    expert = {"model": "~/m", "text": ["~/t.txt", "~nobody-of-that-name/t.txt"]}
    found = parse(data(experts={"a": expert}), folder=Path("/r")).experts["a"]
    assert found.model == tmp_path / "m"
    assert found.text == [tmp_path / "t.txt", Path("/r/~nobody-of-that-name/t.txt")]


def test_union_is_a_size():
    assert parse(data(size="union")).size == "union"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sise": 1}, "sise: unknown key; did you mean 'size'? known: anchor, dtype"),
        ({"fold": {"densty": 0.5}}, "fold.densty: unknown key"),
        ({"fold": {"rigde": 0.5}}, "fold.rigde: unknown key; did you mean 'ridge'?"),
        ({"union": {"alhpa": 0.5}}, "union.alhpa: unknown key; did you mean 'alpha'?"),
        ({"heal": {"tokns": 5}}, "key 'tokns'; did you mean 'tokens'?"),
        ({"size": {"widht": 5}}, "size.widht: unknown key; did you mean 'width'?"),
        ({"experts": {"a": {"modle": "a", "text": ["t"]}}}, "experts.a.modle: unknown key; did you mean 'model'?"),
        ({"experts": {"a": {"text": ["t"]}}}, "experts.a.model: Field required"),
        ({"method": "flod"}, "no method 'flod'; did you mean 'fold'?"),
        ({"anchor": "c"}, "anchor: 'c' is not among the experts (a, b)"),
        ({"experts": {}}, "experts: expected a name for each expert, with its model and its text"),
        ({"experts": ["a"]}, "experts: expected a name for each expert"),
        ({"experts": {"a": "../m/x"}}, "experts.a: '../m/x' is no set of keys; write {model: ../m/x, text: FILE}"),
        ({"experts": {1: {"model": "a", "text": "t"}}}, "experts: YAML reads the name 1 as int; quote it"),
        ({"experts": {True: {"model": "a", "text": "t"}}}, "the name True as bool; quote it"),
        *(({"experts": {n: {}}}, f"experts: {n!r} is no name") for n in ("", "a\nb", "..", "../b", "a\\b")),
        ({"experts": {"a": {"model": "a", "text": "https://x.y/z"}}}, "text: 'https://x.y/z' is an address; texts are"),
        ({"experts": {"a": {"model": "https://x.y/z", "text": "t"}}}, "or hf:ORG/NAME"),
        ({"merge_method": "ties", "method": None}, "merge_method: is a key of mergekit's format"),
        ({"metod": "fold", "method": None}, "metod: unknown key; did you mean 'method'?"),
        ({"metod": None}, "metod: unknown key"),
        ({"fold": {"densty": None}}, "fold.densty: unknown key"),
        ({"fold": 5}, "fold: expected keys, found 5"),
        ({"fold": {"refine": "much"}}, "fold.refine: 'much' is not a count"),
        ({"size": "1.5x"}, "size: '1.5x' is neither a set of keys nor union; write {params: 1.5x}"),
        ({"heal": "100k"}, "heal: '100k' is no set of keys; write {tokens: 100k}"),
        ({"heal": True}, "write {tokens: 400k}"),
        (
            {"experts": {"a": {"model": "a", "text": []}}},
            "experts.a: no text; name files of the expert's skill, or set",
        ),
        ({"experts": {"a": {"model": "a"}}}, "experts.a: no text; name files"),
        ({"experts": {"a": {"model": "a", "write": 0}}}, "experts.a: no text; name files"),
        ({"experts": {"a": {"model": "a", "write": "much"}}}, "'much' is not a count"),
        ({"size": {"params": "1.5y"}}, "size.params: '1.5y' is not a count"),
        ({"size": {"params": "x"}}, "size.params: 'x' is not a multiple"),
        ({"size": {"params": "0x"}}, "size.params: '0x': a model needs more than no parameters"),
        ({"size": {"params": "infx"}}, "size.params: 'infx': a model needs more than no parameters and less than"),
        ({"size": {"params": "nanx"}}, "size.params: 'nanx': a model needs"),
        ({"fold": {"tokens": "1e400"}}, "fold.tokens: '1e400' is not a count"),
        ({"fold": {"ridge": float("inf")}}, "fold.ridge: "),
        ({"heal": {"batch_rows": [16]}}, "[16] is not a count"),
        ({"seed": 2**64}, "seed: "),
        ({"experts": {"Size": {"model": "a", "txt": "t"}}}, "experts.Size.txt: unknown key"),
        ({"size": {"params": -1}}, "size.params: -1 is neither a multiple"),
        ({"size": {"width": 0}}, "size.width: "),
        ({"fold": {"length": 4}}, "fold.length: "),
        ({"fold": "leen"}, "fold: 'leen' is neither lean nor whole, nor keys such as tokens: 64k"),
        ({"fold": {"tokens": "many"}}, "fold.tokens: 'many' is not a count"),
        ({"heal": {"lr": -1}}, "lr"),
        ({"heal": {"text": "some"}}, "'some' is no number"),
        ({"heal": {"lr": [1]}}, "[1] is no number"),
        ({"union": {"alpha": 1}}, "union.alpha: "),
        ({"dtype": "int8"}, "dtype: "),
        ({"seed": -1}, "seed: "),
    ],
)
def test_refused_with_one_line(changes, message):
    with pytest.raises(RecipeError) as caught:
        parse(data(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("recipe: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected keys such as method, anchor, experts; found NoneType"),
        ("- a\n", "found list"),
        ("method: [\n", "not YAML"),
        (TEXT + "seed: 4\n", "key 'seed' is given twice"),
        ("experts: {a: {model: {{ path }}}}\n", "a key is not a word"),
        ("[a, b]: 1\n", "a key is not a word"),
        ("method: !!python/object/apply:os.getcwd []\n", "not YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_or_binary_file(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.yaml: no such recipe"):
        read(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.yaml: cannot be read as a text file"):
        read(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="cannot be read as a text file"):
        read(tmp_path)


def test_the_docs_tell_every_key_and_the_default_of_what_has_one():
    page = (Path(__file__).parents[1] / "docs/recipe.md").read_text(encoding="utf-8")
    sections = dict(zip(("recipe", "expert", "size", "fold", "union", "heal"), page.split("\n## "), strict=True))
    parts = {"recipe": Recipe, "expert": Expert, "size": Size, "fold": Fold, "union": Union}
    for name, part in parts.items():
        for key in part.model_fields:
            assert f"`{key}`" in sections[name], f"{name}: {key}"
    for field in fields(Heal):
        assert f"`{field.name}`" in sections["heal"], field.name
    assert f"| `tokens` | {Fold().tokens // 1000}k |" in sections["fold"]
    assert f"| `refine` | {Fold().refine} |" in sections["fold"]
    assert f"| `tokens` | {Heal().tokens / 1e6:.1f}M |" in sections["heal"]
    assert f"| `lr` | {Heal(tokens=400_000).peak(0.0):.0e} at 400k".replace("e-0", "e-") in sections["heal"]
    assert f"of {recipes.LONG / 1e6:.0f}M tokens or more" in sections["fold"]
    lean = ", ".join(f"{key}: {value}" for key, value in recipes.LEAN.items()).lower().replace("32000", "32k")
    assert f"`lean`: `{{{lean}}}`" in sections["fold"]
