"""Merge methods: one file each; the folder is the registry."""

import pkgutil

from polymerge._suggest import unknown


def names() -> tuple[str, ...]:
    """The known methods, sorted; nothing is imported."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def check(name: str) -> None:
    """Raise ValueError with the nearest known name unless there is such a method."""
    if name not in names():
        raise ValueError(unknown("method", name, names()))
