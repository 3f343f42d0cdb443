"""Merge LLMs of different architectures into one plain Hugging Face checkpoint.

    import polymerge
    result = polymerge.merge("recipe.yaml", "out")

The public names are those of `__all__`. They are looked up when first used: importing polymerge costs
nothing, and torch is loaded by what needs it.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polymerge.errors import PolymergeError
    from polymerge.evaluate import evaluate
    from polymerge.inspect import inspect
    from polymerge.merge import merge
    from polymerge.recipe import read as read_recipe
    from polymerge.result import MergeResult

    __version__: str

__all__ = ["MergeResult", "PolymergeError", "__version__", "evaluate", "inspect", "merge", "read_recipe"]

_WHERE = {
    "MergeResult": ("result", "MergeResult"),
    "PolymergeError": ("errors", "PolymergeError"),
    "evaluate": ("evaluate", "evaluate"),
    "inspect": ("inspect", "inspect"),
    "merge": ("merge", "merge"),
    "read_recipe": ("recipe", "read"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("polymerge")
    if name not in _WHERE:
        raise AttributeError(f"module 'polymerge' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(f"polymerge.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Binds a function where its module has the same name.

    Importing `polymerge.merge` makes Python bind the *module* to `polymerge.merge`, at a time that depends on
    who imports what first. Users call the function, so the function is what is bound.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _WHERE.get(name) == (name, name):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
