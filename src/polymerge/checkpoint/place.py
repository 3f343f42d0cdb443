"""Where an output folder may go: is it free, may we write, is there space; what killed runs left there."""

import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path

from polymerge.errors import OutputError

_alive: list[Path] = []  # partial folders of this process: they tell its own from those of a pid used before


def check_free(out: Path) -> None:
    """Raise OutputError unless `out` is absent or an empty folder, below a folder and not a file."""
    out = Path(os.path.realpath(out))
    if out.is_dir() and next(out.iterdir(), None) is not None:
        raise OutputError(f"{out}: exists and is not empty; choose another folder or delete it")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder; choose another name")
    base = _nearest(out.parent)
    if not base.is_dir():
        raise OutputError(f"{out}: {base} is a file; expected a folder to write into; choose another place")
    if not os.access(base, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: no permission to write in {base}; choose another folder")


def require_space(path: Path, nbytes: int) -> None:
    """Raise OutputError when the disk that holds (or will hold) `path` has less than `nbytes` free."""
    base = _nearest(Path(os.path.realpath(path)))
    free = shutil.disk_usage(base).free
    if free < nbytes:
        remedy = f"free some space or {elsewhere(path, 'disk')}"
        raise OutputError(f"{path}: needs {_size(nbytes)}, {base} has {_size(free)} free; {remedy}")


def elsewhere(path: Path, what: str) -> str:
    """How to choose another place than a path that the user named, or than the system's for temporary files."""
    path, scratch = (Path(os.path.realpath(p)) for p in (path, tempfile.gettempdir()))
    ours = path.parent.parent == scratch and path.parent.name.startswith("polymerge-") and path.name in ("fold", "heal")
    return "name a folder by --work, or by TMPDIR" if ours or path == scratch else f"choose another {what}"


def make_parents(out: Path) -> list[Path]:
    """Make the missing parents of `out`; returns those made, outermost first."""
    missing = [p for p in reversed(out.parents) if not p.exists()]
    for parent in missing:
        parent.mkdir(exist_ok=True)
    return missing


def begin(out: Path) -> Path:
    """Make the partial folder beside `out`; `finish` takes it off the list of those in use."""
    folder = out.parent / f"{_prefix(out)}{os.getpid()}-{secrets.token_hex(4)}"
    _alive.append(folder)
    folder.mkdir()
    return folder


def finish(folder: Path) -> None:
    """The partial folder was renamed or is to be removed: remove what is still there."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder in _alive:
        _alive.remove(folder)


def remove_stale(out: Path) -> None:
    """Remove partial folders of runs on this machine whose process is gone."""
    if os.name == "nt":  # os.kill(pid, 0) would end the process there
        return
    prefix = _prefix(out)
    for folder in sorted(out.parent.iterdir()):
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if not folder.name.startswith(prefix) or not pid.isdigit() or folder in _alive:
            continue
        if int(pid) == os.getpid() or not _runs(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-{socket.gethostname()}-"


def _size(nbytes: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def _nearest(path: Path) -> Path:
    """The path itself, or its nearest existing ancestor."""
    return next(p for p in (path, *path.parents) if p.exists())


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
