"""The header of a safetensors file, read and checked without touching the tensor data.

File: 8 bytes little-endian header length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the
tensors' bytes, back to back. A file cut short by a broken download still has a perfect header: only comparing
its offsets with the file's size tells.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polymerge.errors import CheckpointError

SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FIRST = 8  # bytes of the header's length
_LIMIT = 100_000_000  # the format's own bound on the header
_AGAIN = "get the file again"


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its shard's file name, dtype, shape and size."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.numel * self.dtype.itemsize


def read_json(file: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when missing, not JSON, or not an object."""
    try:
        found = json.loads(file.read_bytes(), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; {why}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(found).__name__}; expected an object")
    return found


def read_header(file: Path) -> dict[str, Entry]:
    """Entries of one safetensors file in stored order; CheckpointError when corrupt or cut short."""
    try:
        with file.open("rb") as stream:
            first = stream.read(_FIRST)
            length = int.from_bytes(first, "little")
            size = file.stat().st_size
            if first == b"version ":
                raise CheckpointError(f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` there")
            if len(first) < _FIRST or length > min(_LIMIT, size - _FIRST):
                raise CheckpointError(
                    f"{file}: {size} bytes, header length reads {length}: truncated or not safetensors; {_AGAIN}"
                )
            raw = json.loads(stream.read(length), object_pairs_hook=_no_duplicates)
        if not isinstance(raw, dict):
            raise CheckpointError(f"{file}: corrupt safetensors header (not a JSON object); {_AGAIN}")
        raw.pop("__metadata__", None)
        spans = {name: _span(file, name, info) for name, info in raw.items()}
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: corrupt safetensors header ({error}); {_AGAIN}") from error
    _check_layout(file, spans, size - _FIRST - length)
    return {name: entry for name, (entry, _, _) in spans.items()}


def _span(file: Path, name: str, info: Any) -> tuple[Entry, int, int]:
    """Entry and byte range of one header line."""
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: corrupt header at tensor {name!r} ({error!r}); {_AGAIN}") from error
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise CheckpointError(f"{file}: corrupt header at tensor {name!r} ({info}); {_AGAIN}")
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(
            f"{file}: {name!r} has dtype {dtype}; known: {known}. Convert the checkpoint (quantised weights:"
            f" dequantise them first)"
        )
    entry = Entry(file.name, DTYPES[dtype], shape)
    if end - begin != entry.nbytes:
        raise CheckpointError(
            f"{file}: {name!r} spans {end - begin} bytes, but {dtype} {list(shape)} takes {entry.nbytes}; {_AGAIN}"
        )
    return entry, begin, end


def _check_layout(file: Path, spans: dict[str, tuple[Entry, int, int]], stored: int) -> None:
    """Tensors lie back to back from 0 to the end of the file."""
    at = 0
    for name, (_, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin != at:
            raise CheckpointError(f"{file}: {name!r} begins at byte {begin}, expected {at}; {_AGAIN}")
        at = end
    if stored != at:
        what = "truncated, the download is incomplete" if stored < at else "has bytes after the last tensor"
        raise CheckpointError(f"{file}: {stored} bytes of tensor data, the header promises {at}: {what}; {_AGAIN}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found
