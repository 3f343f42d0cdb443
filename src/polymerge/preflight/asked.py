"""What is asked for, and where: folders in each other's way, keys without effect, what a method itself refuses."""

import os
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from polymerge import methods
from polymerge.calibrate.texts import Skill
from polymerge.checkpoint import hub
from polymerge.errors import OutputError
from polymerge.methods import union
from polymerge.methods._lift import lift
from polymerge.model.source import Source
from polymerge.plan import Plan, parameters
from polymerge.preflight.report import Finding
from polymerge.recipe import Recipe, Size


def check_places(recipe: Recipe, out: Path, work: Path | None) -> None:
    """Raise OutputError where the result would be written into what is read, or in the way of the work."""
    place = _real(out)
    if place == _real(Path()):
        raise OutputError(f"{out}: is the folder that this runs in, and the result takes its place; choose another")
    for name, expert in recipe.experts.items():
        for read in (*([] if hub.named(expert.model) else [expert.model]), *expert.text):
            if read.is_dir() and _real(read) in place.parents:
                raise OutputError(f"{out}: lies in {read}, which {name!r} is read from; choose another folder")
    if work is None:
        return
    mine = _real(work)
    if (
        place == mine
        or place in mine.parents
        or any(mine / part in (place, *place.parents) for part in ("fold", "heal"))
    ):
        raise OutputError(
            f"{work}: the work and the result ({out}) would be in each other's way; choose another --work"
        )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def without_effect(recipe: Recipe) -> Iterator[Finding]:
    """Keys that were given and that the method does not read."""
    if recipe.method == "fold":
        return
    unused = ("size", "family", "heal") if recipe.method == "union" else ("size",)
    why = (
        "keeps the experts whole" if recipe.method == "union" else "merges into the least shape that holds each expert"
    )
    for key in unused:
        if key in recipe.model_fields_set and getattr(recipe, key) is not None:
            yield Finding("warning", key, f"has no effect: {recipe.method} {why}")


FEW = 8
"""Rows of a text below which they can't tell whose skill it is, let alone fit anything."""


def few_rows(recipe: Recipe) -> Iterator[Finding]:
    """A calibration that is a slip of the pen."""
    rows, length = max(1, recipe.fold.tokens // recipe.fold.length), recipe.fold.length
    if recipe.method != "union" and rows < FEW:
        text = f"{rows} rows of {length} tokens of each text are too few to merge by; give {FEW * length:,} or more"
        yield Finding("warning", "fold.tokens", text)


def beyond(recipe: Recipe, plan: Plan | None) -> Iterator[Finding]:
    """How far into a text a result is fitted and measured."""
    length = recipe.fold.length
    if plan is not None and plan.shapes[0].max_positions > length:
        text = (
            f"texts are read in rows of {length} tokens, the result states {plan.shapes[0].max_positions:,} positions: "
            "how it does later in a text is not looked at (`polymerge eval --length` tells)"
        )
        yield Finding("approximate", "fold.length", text)


LARGE = 1.5
"""Times the largest expert: the budget of a recipe that gives no size."""


def unbounded(recipe: Recipe, sources: Mapping[str, Source], plan: Plan | None) -> Iterator[Finding]:
    """A shape without a budget, whose other sizes are those of all experts together."""
    if plan is None or plan.budget is not None or not isinstance(recipe.size, Size) or recipe.method != "fold":
        return
    times = parameters(plan.family, plan.shapes[0]) / max(source.parameters for source in sources.values())
    if times > LARGE:
        text = (
            f"the result has {times:.1f} times the parameters of the largest expert; size.params: {LARGE}x bounds them"
        )
        yield Finding("warning", "size", text)


def alike(sources: Mapping[str, Source], texts: Mapping[str, Skill]) -> Iterator[Finding]:
    """Experts that are one model, or whose texts are the same: a slip, most likely."""
    for one, other in combinations(sources, 2):
        if _real(sources[one].path) == _real(sources[other].path):
            yield Finding("warning", f"{other}: model", f"the same folder as {one!r}: a model merged with itself")
        mine, theirs = ({digest for _, digest, _ in texts[name].files} for name in (one, other))
        if mine and mine == theirs:
            text = f"the same files as of {one!r}: nothing tells the experts' skills apart"
            yield Finding("warning", f"{other}: text", text)


def check_method(
    recipe: Recipe, sources: Mapping[str, Source], tokenizers: Mapping[str, Any], plan: Plan | None, anchor: str
) -> None:
    """What a union, or a method of others, refuses by itself. Raises PolymergeError as the merge would."""
    if recipe.method == "union":
        checkpoints = {name: source.checkpoint for name, source in sources.items()}
        union.union_config(checkpoints, anchor=anchor, tokenizers=tokenizers or None, **recipe.union.model_dump())
    elif recipe.method != "fold" and plan is not None:
        rival = methods.rival(recipe.method)(**recipe.options)
        experts, (target,) = list(sources.values()), plan.shapes
        if hasattr(rival, "check"):
            rival.check(experts, list(sources).index(recipe.anchor), target)
        else:
            lift(experts, target)
