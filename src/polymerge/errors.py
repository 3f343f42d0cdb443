"""Everything polymerge raises on purpose.

    PolymergeError
    ├── RecipeError       the recipe: unknown key, wrong value, contradiction
    ├── CheckpointError   a source folder: missing, half-downloaded, corrupt, NaN, remote code
    ├── FamilyError       an architecture, tensor or config key that no family table claims
    ├── TextError         calibration text: missing, empty, not UTF-8, too short
    ├── PreflightError    sources that cannot be merged as asked
    └── OutputError       the output folder: exists, not writable, disk full

A message is one clear line: which file, tensor or key; what was found; what was expected; what to do.
"""


class PolymergeError(Exception):
    """Base of all errors that a user can do something about."""


class RecipeError(PolymergeError):
    """The recipe asks for something unknown or contradictory."""


class CheckpointError(PolymergeError):
    """A source checkpoint is missing, incomplete or damaged."""


class FamilyError(PolymergeError):
    """An architecture, stored tensor or config key is not described by a family table."""


class TextError(PolymergeError):
    """A text is missing, unreadable or too short."""


class PreflightError(PolymergeError):
    """The sources are fine one by one, but cannot be merged as asked."""


class OutputError(PolymergeError):
    """The output cannot be written where it was asked for."""
