"""Streaming, atomic writing of a checkpoint folder.

    with CheckpointWriter(out) as writer:
        writer.add("model.embed_tokens.weight", tensor)   # to disk at once: one tensor in memory
        writer.text("config.json", text)
        writer.copy(expert / "tokenizer.json")

All of it goes to a hidden folder beside `out`. On success that folder gets its index, is flushed to disk
and renamed to `out`; on any exception, Ctrl-C and SIGTERM included, it is removed. So `out` is whole or
absent. A folder left by a killed run (kill -9, power) carries its owner's pid in its name and is removed by
the next writer to the same `out` once that process is gone.

The bytes depend on names, tensors and their order only. A tied tensor is written once, as the caller adds
it once.
"""

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from torch import Tensor

from polymerge.checkpoint.header import SINGLE
from polymerge.checkpoint.place import begin, check_free, elsewhere, finish, make_parents, remove_stale, require_space
from polymerge.checkpoint.shard import ShardFile
from polymerge.errors import OutputError

__all__ = ["SHARD_BYTES", "CheckpointWriter", "check_free", "require_space"]

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointWriter:
    """Context manager that writes one checkpoint folder. Raises OutputError; see the module's text.

    out: folder to make; may exist only if empty. Missing parents are made (and removed again on failure).
    shard_bytes: a shard is closed before its tensor data would exceed this.
    """

    def __init__(self, out: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        # Through a symlink too, the rename must happen where the folder really is.
        self.out = Path(os.path.realpath(out))
        self.shard_bytes = shard_bytes
        self._temp: Path | None = None
        self._parents: list[Path] = []
        self._shard: ShardFile | None = None
        self._shards: list[str] = []
        self._where: dict[str, int] = {}
        self._bytes = 0
        self._parameters = 0
        self._restore: Callable[[], object] = lambda: None

    @property
    def folder(self) -> Path:
        """The folder being written, for other code that writes files (`tokenizer.save_pretrained`)."""
        if self._temp is None:
            raise OutputError(f"{self.out}: not being written; use CheckpointWriter in a `with` statement")
        return self._temp

    def __enter__(self) -> "CheckpointWriter":  # noqa: PYI034  beartype checks method by method: no Self
        check_free(self.out)
        self._restore = _sigterm_raises()
        try:
            with _telling(self.out):
                self._parents = make_parents(self.out)
                remove_stale(self.out)
                self._temp = begin(self.out)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _telling(self.out):
                    self._publish()
        except BaseException:
            self._abandon()
            raise
        else:
            if kind is not None:
                self._abandon()
                # The caller's own write into `folder` met a full disk: tell it like ours.
                if isinstance(error, OSError) and error.errno in _FULL:
                    with _telling(self.out):
                        raise error
        finally:
            self._restore()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (any device and shape; stored contiguous, in its own dtype)."""
        if name in self._where:
            raise OutputError(f"{self.out}: tensor {name!r} added twice; expected once")
        with _telling(self.out):
            if self._shard is not None and self._shard.nbytes + tensor.nbytes > self.shard_bytes:
                self._close_shard()
            if self._shard is None:
                self._shard = ShardFile(self.folder / f"part-{len(self._shards) + 1:05d}")
            self._shard.add(name, tensor)
        self._where[name] = len(self._shards)
        self._bytes += tensor.nbytes
        self._parameters += tensor.numel()

    def text(self, filename: str, content: str) -> None:
        """Write one UTF-8 text file."""
        with _telling(self.out):
            self._new(filename).write_bytes(content.encode())

    def copy(self, source: Path, filename: str | None = None) -> None:
        """Copy a file's content, under its own name unless another is given."""
        with _telling(self.out):
            shutil.copyfile(source, self._new(filename or source.name))

    def _new(self, filename: str) -> Path:
        file = self.folder / filename
        if Path(filename).name != filename or file.exists():
            raise OutputError(f"{self.out}: {filename!r} is not a new plain file name in the output folder")
        return file

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shards.append(self._shard.path.name)
            self._shard = None

    def _publish(self) -> None:
        """Final names, index, flush, rename."""
        self._close_shard()
        total = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)] if total > 1 else [SINGLE]
        for part, name in zip(self._shards, names, strict=False):  # without tensors there is a name, and no part
            (self.folder / part).rename(self.folder / name)
        if total > 1:
            index = {
                "metadata": {"total_parameters": self._parameters, "total_size": self._bytes},
                "weight_map": {tensor: names[i] for tensor, i in sorted(self._where.items())},
            }
            self.text(INDEX, json.dumps(index, indent=2) + "\n")
        for file in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            _flush(file)
        _flush(self.folder)
        check_free(self.out)  # somebody may have written there meanwhile
        if self.out.is_dir():
            self.out.rmdir()  # empty: rename onto an existing folder is not possible everywhere
        self.folder.rename(self.out)
        finish(self.folder)
        self._temp = None
        _flush(self.out.parent)

    def _abandon(self) -> None:
        """Remove all traces."""
        if self._shard is not None:
            self._shard.discard()
            self._shard = None
        if self._temp is not None:
            finish(self._temp)
            self._temp = None
        for parent in reversed(self._parents):
            try:
                parent.rmdir()
            except OSError:  # something else lives there by now
                break
        self._restore()


@contextmanager
def _telling(out: Path) -> Iterator[None]:
    """Turn the system's errors into OutputError with what to do."""
    try:
        yield
    except OSError as error:
        reason, remedy = error.strerror or str(error), elsewhere(out, "folder")
        if error.errno in _FULL:
            reason, remedy = "no space left on the disk", f"free some space or {elsewhere(out, 'disk')}"
        raise OutputError(f"{out}: not written: {reason} ({error.filename or out.parent}); {remedy}") from error


def _flush(path: Path) -> None:
    """Fsync a file or folder (folders cannot be opened on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sigterm_raises() -> Callable[[], object]:
    """Make SIGTERM raise, so that it cleans up like Ctrl-C; returns what puts the old handler back.

    Only where nobody else handles it, and only in the main thread (signals can be set nowhere else).
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return lambda: None

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    return lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)
