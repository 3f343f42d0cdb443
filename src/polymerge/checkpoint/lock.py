"""polymerge-lock.json: all that must be the same for a merge to give the same bytes again.

No time, host or absolute path: the same inputs give the same file.
"""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from polymerge.checkpoint.header import read_json

LOCK = "polymerge-lock.json"
FORMAT = 1
PACKAGES = ("numpy", "polymerge", "safetensors", "scipy", "tokenizers", "torch", "transformers")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change the result; asks no package to load."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def lock_text(
    *,
    recipe: Mapping[str, Any],
    sources: Mapping[str, Mapping[str, str]],
    texts: Mapping[str, Mapping[str, Any]],
    calibration: str,
    seed: int,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """The lock as JSON.

    recipe: resolved. sources: expert -> `Checkpoint.file_digests()`. texts: skill -> `Skill.split_record()`.
    calibration: hash of the calibration tokens used. extra: further top-level keys, e.g. the knobs chosen.
    """
    lock = {
        "format": FORMAT,
        "recipe": recipe,
        "sources": sources,
        "texts": texts,
        "calibration": calibration,
        "seed": seed,
        "packages": package_versions(),
        **(extra or {}),
    }
    return json.dumps(lock, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def measured_by(folder: Path) -> dict[str, int]:
    """The `seed` of the split and the `length` of the rows that a merge measured its result by; none without a lock."""
    if not (folder / LOCK).is_file():
        return {}
    recipe = read_json(folder / LOCK, "expected the lock of a merge").get("recipe", {})
    found = {"seed": recipe.get("seed"), "length": recipe.get("fold", {}).get("length")}
    return {key: value for key, value in found.items() if isinstance(value, int)}
