"""What a row says about the machine and the code that made it, and the memory peak of one run."""

import contextlib
import hashlib
import platform
import re
import resource
import subprocess
from pathlib import Path

from polymerge.clock import peak_bytes


def without_folders(text: str) -> str:
    """A message with the names of files and not the folders of this machine."""
    return re.sub(r"(?<![^\s'\"(])/\S*/(?=[^\s/])", "", text)


def describe(device: str) -> str:
    """The processor or GPU by name, and how much of it is used."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The code's commit, "+" where files differ from it; empty outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        said = [
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603, S607
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", here.parent])
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said[0] + ("+" if said[1] else "")


def code() -> str:
    """A hash of the package's own files: work of other code is not gone on with."""
    package, total = Path(__file__).resolve().parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def versions() -> dict[str, str]:
    """What the figures were made with."""
    import torch
    import transformers

    import polymerge

    made = {"polymerge": polymerge.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return made | {"python": platform.python_version()}


def reset_peak(device: str) -> None:
    """Begin to measure the memory peak anew, where the system can."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def children_peak(device: str) -> int:
    """Bytes at the peak of any child that has ended; on a GPU, where its own memory counts, none."""
    return 0 if device.startswith("cuda") else peak_bytes(resource.RUSAGE_CHILDREN)


def peak(device: str) -> int:
    """Bytes at the peak since `reset_peak`: allocated on a GPU, resident otherwise."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    return peak_bytes()
