"""Families of decoders: one file each; the folder is the registry."""

import importlib
import pkgutil

from polymerge.errors import FamilyError
from polymerge.model.spec import Family


def names() -> tuple[str, ...]:
    """The known model types, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(model_type: str) -> Family:
    """The table of a family. Raises FamilyError with the known ones: a near name is another architecture, no typo."""
    if model_type not in names():
        raise FamilyError(f"config.json: no family {model_type!r}; known: {', '.join(names())}")
    family: Family = importlib.import_module(f"polymerge.families.{model_type}").FAMILY
    return family
