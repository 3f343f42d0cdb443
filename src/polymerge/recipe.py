"""What the user asks for: a YAML file, checked key by key before anything else happens.

    method: fold                 # a file in methods/
    anchor: prose                # whose family and, unless `tokenizer` says else, tokenizer the result takes
    tokenizer: prose             # optional: an expert's; or union: the vocabularies of all in one
    experts:
      prose: {model: experts/prose-llama, text: [text/prose.txt]}
      code:  {model: experts/code-neox,   text: [text/code.txt]}   # or write: 64k, and it writes its own
    size: {params: 1.5x}         # times the largest expert; or {width:, layers:, heads:, mlp:}; or union
    heal: {tokens: 1.7M}         # optional
    dtype: bfloat16
    seed: 0

Paths are relative to the recipe's folder. Unknown keys are refused with the nearest known one.
"""

import os
from collections.abc import Container, Hashable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from polymerge import methods
from polymerge._quantities import Budget, Count, budget, count, dtype_name, number, whole
from polymerge._suggest import closest, unknown
from polymerge.checkpoint import hub
from polymerge.errors import RecipeError
from polymerge.heal import Heal


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_given(cls, data: Any) -> Any:
        return _given(data, cls.model_fields) if isinstance(data, dict) else data


def _given(data: dict[Any, Any], known: Container[str]) -> dict[Any, Any]:
    """Without the known keys that are left empty; an unknown one stays, to be refused."""
    return {key: value for key, value in data.items() if value is not None or key not in known}


class Expert(_Strict):
    """A source model and the texts of its skill (`field`: the key of JSON records).

    `write`: tokens that the expert writes itself, to calibrate by beside the texts, or in place of them. By default as
    many as the texts lack of what is `wanted`; 0: none.
    """

    model: Path
    text: list[Path] = []
    field: str = "text"
    write: Annotated[int, BeforeValidator(count), Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_text(cls, data: Any) -> Any:
        if isinstance(data, str):
            raise ValueError(f"{data!r} is no set of keys; write {{model: {data}, text: FILE}}")  # noqa: TRY004  pydantic's
        if isinstance(data, dict) and isinstance(data.get("text"), str):
            data = {**data, "text": [data["text"]]}
        if isinstance(data, dict):
            _check_local(data)
        return data

    @model_validator(mode="after")
    def _some_text(self) -> "Expert":
        if not self.text and not self.write:
            raise ValueError("no text; name files of the expert's skill, or set write: 64k and it writes its own")
        return self


def _check_local(expert: dict[str, Any]) -> None:
    """An address would be read as a path, and reported with a slash less."""
    if "://" in str(expert.get("model")):
        raise ValueError(f"model: {expert['model']!r} is an address; expected a folder, or {hub.PREFIX}ORG/NAME")
    for text in expert["text"] if isinstance(expert.get("text"), list) else []:
        if "://" in str(text):
            raise ValueError(f"text: {text!r} is an address; texts are local files: fetch it first")


class Size(_Strict):
    """A parameter budget, or an explicit shape (what is left out is chosen to fit), or both."""

    params: Annotated[Budget, BeforeValidator(budget)] | None = None
    width: int | None = Field(None, gt=0)
    layers: int | None = Field(None, gt=0)
    heads: int | None = Field(None, gt=0)
    mlp: int | None = Field(None, gt=0)


class Union(_Strict):
    """The mixture: `alpha` share spread evenly after each token; below `skip_below` an expert does not run."""

    alpha: float = Field(0.01, ge=0, lt=1)
    skip_below: float = Field(0.0, ge=0, lt=1)


LEAN: dict[str, Any] = {"tokens": 32_000, "refine": 0, "trials": False}
"""`fold: lean`: a fold at a tenth of the price."""
LONG = 1_000_000
"""Tokens of healing from which on a lean fold ends as well as a whole one, or nearly, and what that costs is better
spent on more of them (three pairs, LOG.md)."""


class Fold(_Strict):
    """Calibration and solver of the fold; `trials` on held-out text choose the seven knobs, unless given.

    Where `LONG` healing follows, what is not given is that of a `LEAN` fold.
    """

    tokens: Count = 128_000
    length: int = Field(128, ge=8)
    ownership: Literal["label", "gate"] = "label"
    refine: Annotated[int, BeforeValidator(count), Field(ge=0)] = 480
    refine_lr: float = Field(4e-3, gt=0)
    trials: bool = True
    ridge: float | None = Field(None, gt=0)
    mute: float | None = Field(None, ge=0)
    mute_last: float | None = Field(None, ge=0)
    off_gate: float | None = Field(None, ge=0)
    off_weight: float | None = Field(None, ge=0)
    even: float | None = Field(None, ge=0, le=1)
    hosts: Literal["ends", "centred"] | None = None


def healing(value: object) -> object:
    """The `heal:` keys as settings of `heal.py`."""
    if isinstance(value, Heal | None):
        return value
    if not isinstance(value, dict):
        example = value if isinstance(value, str) else "400k"
        raise ValueError(f"{value!r} is no set of keys; write {{tokens: {example}}}")  # noqa: TRY004  pydantic's
    known = [f.name for f in fields(Heal)]
    for key in value:
        if key not in known:
            raise ValueError(unknown("key", str(key), known))
    given = {key: v for key, v in value.items() if v is not None}  # a key left empty: its default
    reads: dict[str, Any] = dict.fromkeys(("tokens", "batch_rows", "length", "evaluate_every"), whole)
    reads |= dict.fromkeys(("lr", "warmup", "features", "text"), number)
    return Heal(**{key: reads[key](v) if key in reads else v for key, v in given.items()})


WORDS = {"lean": LEAN, "whole": {key: Fold.model_fields[key].default for key in LEAN}}


class Recipe(_Strict):
    """A whole recipe."""

    method: str
    anchor: str
    tokenizer: str | None = None
    experts: dict[str, Expert] = Field(min_length=1)
    size: Size | Literal["union"] = Size(params=Budget(times=1.5))
    family: str | None = None
    heal: Annotated[Heal | None, BeforeValidator(healing)] = None
    fold: Fold = Field({}, validate_default=True)  # after `heal`, which it depends on
    union: Union = Union()
    options: dict[str, Any] = Field(default_factory=dict)
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], BeforeValidator(dtype_name)] = "bfloat16"
    seed: int = Field(0, ge=0, lt=2**62)

    @field_validator("experts", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if not isinstance(value, dict) or not value:
            raise ValueError("expected a name for each expert, with its model and its text")
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"YAML reads the name {name!r} as {type(name).__name__}; quote it")  # noqa: TRY004  pydantic's
            if not name.strip() or not name.isprintable() or "/" in name or "\\" in name or name in (".", ".."):
                raise ValueError(f"{name!r} is no name for an expert; expected a word, without slashes and line ends")
        return value

    @field_validator("size", mode="before")
    @classmethod
    def _budget_alone(cls, value: object) -> object:
        if isinstance(value, str | int | float) and value != "union":
            raise ValueError(f"{value!r} is neither a set of keys nor union; write {{params: {value}}}")
        return value

    @field_validator("fold", mode="before")
    @classmethod
    def _lean_or_whole(cls, value: object, seen: Any) -> object:
        """The keys that a word stands for; those of a lean fold, where none are given and long healing follows."""
        if isinstance(value, str):
            if value not in WORDS:
                raise ValueError(f"{value!r} is neither {' nor '.join(WORDS)}, nor keys such as tokens: 64k")
            return WORDS[value]
        heal, folds = seen.data.get("heal"), seen.data.get("method") == "fold"
        if isinstance(value, dict) and folds and heal is not None and heal.tokens >= LONG:
            return LEAN | _given(value, Fold.model_fields)
        return value

    @property
    def wanted(self) -> int:
        """Tokens of text that each expert is to have; those that its files lack it writes by default.

        What the fold reads, or the expert's part of what healing reads, as far as a default fold would ask for it.
        """
        healed = 0 if self.heal is None else self.heal.tokens // len(self.experts)
        return max(self.fold.tokens, min(healed, Fold().tokens))

    @model_validator(mode="after")
    def _names(self) -> "Recipe":
        if self.anchor not in self.experts:
            raise ValueError(f"anchor: {self.anchor!r} is not among the experts ({', '.join(self.experts)})")
        methods.check(self.method)
        self._check_tokenizer()
        methods.check_options(self.method, self.options)
        return self

    def _check_tokenizer(self) -> None:
        known = [*self.experts, "union"]
        if self.tokenizer is not None and self.tokenizer not in known:
            raise ValueError(f"tokenizer: {unknown('tokenizer', self.tokenizer, known)}")
        if self.tokenizer == "union" and "union" in self.experts:
            raise ValueError("tokenizer: 'union' is an expert's name here; rename the expert")
        if self.tokenizer == "union" and self.method == "union":
            raise ValueError(
                "tokenizer: a union keeps the experts whole, so one of them must read the result's tokens; "
                "name an expert, or use method: fold"
            )


def read(path: Path | str) -> Recipe:
    """A recipe file; its paths resolved. Raises RecipeError: one line, naming file and key."""
    return read_with_text(path)[0]


def read_with_text(path: Path | str) -> tuple[Recipe, str]:
    """A recipe and its file's text. Raises RecipeError as `read` does."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a text file ({error})") from error
    try:
        data = yaml.load(text, Loader=_NoRepeats)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return parse(data, where=str(path), folder=path.parent), text


def parse(data: object, *, where: str = "recipe", folder: Path | None = None) -> Recipe:
    """A recipe from plain data. Raises RecipeError."""
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected keys such as method, anchor, experts; found {type(data).__name__}")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_first(error)}") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    base = folder or Path()
    experts = {
        name: e.model_copy(update={"model": _place(base, e.model), "text": [base / _home(t) for t in e.text]})
        for name, e in recipe.experts.items()
    }
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in recipe.options.items()}
    if isinstance(options.get("bases"), tuple):
        options["bases"] = tuple(str(_place(base, Path(str(b)))) for b in options["bases"])
    return recipe.model_copy(update={"experts": experts, "options": options})


def _place(base: Path, model: Path) -> Path:
    """Where a model is: relative to the recipe, but for one of the hub."""
    return model if hub.named(model) else base / _home(model)


def _home(path: Path) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path's raises where there is no such user


def _first(error: ValidationError) -> str:
    """A complaint of pydantic in a line, in the recipe's own words: a key misspelt before what it leaves out."""
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = [str(p) for p in problem["loc"] if not str(p).startswith(("function-", "literal["))]
    if where[:2] == ["size", "Size"]:  # which of the kinds that `size` may be
        del where[1]
    key = ".".join(where)
    if key in MERGEKIT:
        return f"{key}: is a key of mergekit's format; polymerge's is another, which docs/recipe.md tells"
    if problem["type"] == "extra_forbidden":
        near = closest(where[-1], _known(where[:-1]))
        hint = f"; did you mean {near!r}?" if near else ";"
        return f"{key}: unknown key{hint} known: {', '.join(sorted(_known(where[:-1])))}"
    kinds = ("model_type", "dict_type")
    message = "expected keys" if problem["type"] in kinds else problem["msg"].removeprefix("Value error, ")
    found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
    return f"{key}: {message}{found}" if key and not message.startswith(key) else f"{message}{found}"


MERGEKIT = ("merge_method", "models", "slices")


def _known(path: list[str]) -> list[str]:
    """Keys allowed at a place in the recipe."""
    if not path:
        return list(Recipe.model_fields)
    places: dict[str, type[BaseModel]] = {
        "experts": Expert, "size": Size, "fold": Fold, "union": Union,
    }  # fmt: skip
    return list(places[path[0]].model_fields)


class _NoRepeats(yaml.SafeLoader):
    """YAML where a key written twice is an error, not a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
