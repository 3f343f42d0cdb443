"""One safetensors file, written tensor by tensor.

The format wants the header first and no holes, and a tensor must start at a multiple of its element size.
Both are only known at the end, so the data go to one spool file per element size; closing writes the header
and appends the spools, widest elements first. Memory: one tensor. Disk: for a moment, one shard twice.
"""

import json
import shutil
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from polymerge.checkpoint.header import DTYPES
from polymerge.errors import OutputError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY = 1 << 24


class ShardFile:
    """A safetensors file in the making at `path`; `close()` completes it, `discard()` removes its pieces."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._spools: dict[int, BinaryIO] = {}
        self._stored: dict[int, list[tuple[str, torch.dtype, tuple[int, ...], int]]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor's bytes."""
        if tensor.dtype not in _NAMES or tensor.is_meta:
            raise OutputError(f"tensor {name!r}: {tensor.dtype} on {tensor.device} cannot be stored")
        width = tensor.dtype.itemsize
        if width not in self._spools:
            self._spools[width] = self._spool(width).open("wb")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        _write(self._spools[width], flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        self._stored.setdefault(width, []).append((name, tensor.dtype, tuple(tensor.shape), tensor.nbytes))
        self.nbytes += tensor.nbytes

    def close(self) -> None:
        """Write header and data to `path`, remove the spools."""
        widths = sorted(self._spools, reverse=True)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for width in widths:
            for name, dtype, shape, nbytes in self._stored[width]:
                header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, at + nbytes]}
                at += nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # data then start at a multiple of 8 in the file
        for spool in self._spools.values():
            spool.close()
        with self.path.open("wb") as out:
            _write(out, len(raw).to_bytes(8, "little") + raw)
            for width in widths:
                with self._spool(width).open("rb") as source:
                    shutil.copyfileobj(source, out, _COPY)
                self._spool(width).unlink()
        self._spools.clear()

    def discard(self) -> None:
        """Close and forget the spools; their folder is about to be removed."""
        for spool in self._spools.values():
            try:
                spool.close()
            except OSError:  # flushing the rest fails again on a full disk
                continue
        self._spools.clear()

    def _spool(self, width: int) -> Path:
        return self.path.with_name(f"{self.path.name}.spool{width}")


def _write(stream: BinaryIO, data: bytes | memoryview) -> None:
    """One place through which all tensor bytes go."""
    stream.write(data)
