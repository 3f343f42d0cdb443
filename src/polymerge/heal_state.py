"""The folder of a healing: its resumable state, written whole or not at all, and its log.

The state belongs to one set of inputs and is refused for any other, naming those that differ: going on from
it would give a result that no recipe describes.
"""

import json
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from polymerge.errors import OutputError

STATE, LOG = "heal.pt", "heal.jsonl"
_DAMAGED = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError)


class Folder:
    """`heal.pt` and `heal.jsonl` in `path`; `inputs` are the digests of all that the result depends on."""

    def __init__(self, path: Path, inputs: Mapping[str, str]) -> None:
        self.path, self.inputs = path, dict(inputs)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path}: cannot be made ({error.strerror}); choose another folder") from error

    def load(self) -> dict[str, Any] | None:
        """The state, None if there is none. Raises OutputError if it is damaged or of other inputs."""
        file = self.path / STATE
        if not file.exists():
            return None
        advice = f"delete {self.path} to start afresh"
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            theirs: dict[str, str] = state.pop("inputs")
        except _DAMAGED as error:
            raise OutputError(f"{file}: not a healing state, or damaged; {advice}") from error
        names = sorted({*theirs, *self.inputs})
        differing = [
            f"{n} (then {theirs.get(n, 'none')[:12]}, now {self.inputs.get(n, 'none')[:12]})"
            for n in names
            if theirs.get(n) != self.inputs.get(n)
        ]
        if differing:
            raise OutputError(f"{file}: of a run with another {', '.join(differing)}; {advice}, or give the former")
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state. Raises OutputError, with the former state in place, if it cannot be written."""
        file = self.path / STATE
        half = file.with_suffix(".tmp")
        try:
            with half.open("wb") as stream:
                torch.save({**state, "inputs": self.inputs}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            half.replace(file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            half.unlink(missing_ok=True)
            raise OutputError(f"{file}: cannot be written ({error}); free some space") from error

    def log(self, points: Sequence[Mapping[str, Any]], *, afresh: bool = False) -> None:
        """Append lines to the log, or replace it by them."""
        file = self.path / LOG
        mode: Literal["w", "a"] = "w" if afresh else "a"
        try:
            with file.open(mode, encoding="utf-8") as stream:
                stream.writelines(json.dumps(_finite(point)) + "\n" for point in points)
        except OSError as error:
            raise OutputError(f"{file}: cannot be written ({error.strerror}); free some space") from error


def _finite(value: Any) -> Any:
    """JSON has no infinity: null in its place."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
