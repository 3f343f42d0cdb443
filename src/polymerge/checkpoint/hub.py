"""Checkpoints of the Hugging Face hub by name, `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`.

Nothing but this prefix ever asks the network: a path is a path. What is fetched lies in the hub's own cache.
"""

from functools import lru_cache
from pathlib import Path

from polymerge.errors import CheckpointError

PREFIX = "hf:"
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")
OTHERS = ("*/*", "consolidated*")  # other formats' folders, and Mistral's weights under other names


def named(path: Path | str) -> bool:
    """Whether this names a checkpoint of the hub."""
    return Path(path).as_posix().startswith(PREFIX)


def local(path: Path | str) -> Path:
    """The folder: of a name, where the hub's cache has it, fetched first if need be. Raises CheckpointError."""
    return _fetched(Path(path).as_posix()) if named(path) else Path(path)


@lru_cache(maxsize=64)
def _fetched(name: str) -> Path:
    """Once a process, so that a branch which moves meanwhile changes nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=list(FILES), ignore_patterns=list(OTHERS)
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        said = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"{name}: the hub does not give it ({said.splitlines()[0]}); expected {PREFIX}ORG/NAME or"
            f" {PREFIX}ORG/NAME@REVISION, a network or the hub's cache and, for a gated model, `hf auth login`"
        ) from error


def title(folder: Path) -> str:
    """What to call a checkpoint: ORG/NAME of one that lies in the hub's cache, else the folder's name."""
    kind, *name = folder.parent.parent.name.split("--")
    return "/".join(name) if kind == "models" and folder.parent.name == "snapshots" else folder.name
