"""Merge methods: one file each; the folder is the registry."""

import importlib
import pkgutil
from dataclasses import asdict
from typing import Any

from polymerge._suggest import unknown

OURS = ("fold", "union")


def names() -> tuple[str, ...]:
    """The known methods, sorted; nothing is imported."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def check(name: str) -> None:
    """Raise ValueError with the nearest known name unless there is such a method."""
    if name not in names():
        raise ValueError(unknown("method", name, names()))


def rival(name: str) -> Any:
    """The `Method` of a file: a frozen dataclass whose fields are its recipe options."""
    return importlib.import_module(f"polymerge.methods.{name}").Method


def options(name: str) -> dict[str, Any]:
    """A method's recipe options and their defaults; ours have stages of their own in the recipe."""
    return {} if name in OURS else asdict(rival(name)())


def check_options(name: str, given: dict[str, Any]) -> None:
    """Raise ValueError for an option that a method does not have."""
    known = list(options(name)) if given else []
    for key in given:
        if key not in known:
            raise ValueError(f"options: {unknown('option', key, known)} ({name})")
