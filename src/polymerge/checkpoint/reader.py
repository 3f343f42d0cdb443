"""A Hugging Face checkpoint folder, read lazily: one tensor, or a part of one, at a time.

Layout read: `config.json` beside either `model.safetensors` or `model.safetensors.index.json` and its shards.
Constructing a `Checkpoint` of a folder reads nothing. Names, shapes and dtypes come from the safetensors headers
(format: 8 bytes little-endian header length, JSON header, tensor data without holes). `check()` validates
everything that can be known without reading the weights; `check_finite()` reads them once, one at a time.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polymerge._suggest import closest
from polymerge.checkpoint import hub
from polymerge.checkpoint.header import SINGLE, Entry, read_header, read_json
from polymerge.errors import CheckpointError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER, STEP = "adapter_config.json", "checkpoint-"
UNION = "polymerge_union"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_SCAN = 1 << 24  # elements looked at together by check_finite: bounds its temporary memory
_READ = 1 << 22  # bytes hashed together


class Checkpoint:
    """A checkpoint folder. Cheap to make; raises CheckpointError when what is asked for is not there.

    `path` may be a name on the hub (`hub.py`). `names` is sorted. Tensors come back on the CPU in their stored dtype.
    Usable as a context manager; `close()` lets go of the open shards (they reopen by themselves when needed again).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = hub.local(path)
        self._open: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    def __enter__(self) -> "Checkpoint":  # noqa: PYI034  beartype checks method by method: no Self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all open shards."""
        while self._open:
            _, handle = self._open.popitem()
            handle.__exit__(None, None, None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The raw `config.json`."""
        if not self.path.is_dir():
            kind = "is not a folder" if self.path.exists() else "does not exist"
            raise CheckpointError(
                f"{self.path}: {kind}; expected a checkpoint folder, or {hub.PREFIX}ORG/NAME for one of the hub"
            )
        if not (self.path / CONFIG).is_file():
            raise CheckpointError(_no_config(self.path))
        return read_json(self.path / CONFIG, "expected a Hugging Face checkpoint folder with this file")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all stored tensors, sorted."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, as stored."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def parameters(self) -> int:
        """Number of stored elements (a tied head is stored once)."""
        return sum(entry.numel for entry in self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor: CPU, stored dtype, shape as stored."""
        entry = self._entry(name)
        try:
            tensor: Tensor = self._shard(entry.file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / entry.file}: {name!r} cannot be read ({error})") from error
        return tensor

    def slice(self, name: str) -> Any:
        """A lazy view of one tensor: index it (`view[a:b, c:d]`) to read only that part."""
        return self._shard(self._entry(name).file).get_slice(name)

    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights: the single file, or the index's shards in order."""
        return tuple(self.path / shard for shard in self._shards)

    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer files present, `generation_config.json` not among them."""
        return tuple(p for p in (self.path / name for name in TOKENIZER_FILES) if p.is_file())

    def generation_config_file(self) -> Path | None:
        """`generation_config.json`, where there is one."""
        file = self.path / GENERATION_CONFIG
        return file if file.is_file() else None

    def check(self) -> None:
        """Validate the folder without reading weights; raises CheckpointError with the first defect found."""
        if self.config.get("auto_map") and any(self.path.glob("*.py")):
            if self.config.get("model_type") == UNION:
                raise CheckpointError(
                    f"{self.path}: a union that polymerge made; name the experts that it holds instead"
                )
            raise CheckpointError(
                f"{self.path / CONFIG}: has `auto_map`, so the model runs Python code of its own, which is"
                f" not run here; use a checkpoint of a stock class or, if the weights fit one, copy the folder"
                f" without its Python files"
            )
        _ = self._entries

    def check_finite(self, progress: Callable[[str], None] | None = None) -> None:
        """Read every float tensor once and raise CheckpointError at the first with NaN or infinity.

        progress: called with each tensor's name before it is read.
        """
        for name in self.names:
            if progress is not None:
                progress(name)
            if not (self.dtype(name).is_floating_point or self.dtype(name).is_complex):
                continue
            flat = self.tensor(name).flatten()
            narrow = flat.element_size() == 1  # float8: isfinite is not defined for it everywhere
            bad = sum(
                int((~torch.isfinite(part.float() if narrow else part)).sum()) for part in torch.split(flat, _SCAN)
            )
            if bad:
                raise CheckpointError(
                    f"{self.path / self._entry(name).file}: {name!r} has {bad} NaN or infinite values of"
                    f" {flat.numel()}; expected finite weights. Get the checkpoint again or leave it out"
                )

    def file_digests(self) -> dict[str, str]:
        """sha256 of each file that the merge depends on: config, weights, tokenizer; by file name."""
        index = (self.path / INDEX,) if (self.path / INDEX).is_file() and self._shards != (SINGLE,) else ()
        files = (self.path / CONFIG, *index, *self.weight_files(), *self.tokenizer_files())
        return {file.name: _sha256(file) for file in files}

    def digest(self) -> str:
        """One sha256 over `file_digests()`."""
        lines = "".join(f"{name} {value}\n" for name, value in sorted(self.file_digests().items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            near = closest(name, self._entries)
            hint = f"; nearest stored name: {near!r}" if near else ""
            raise CheckpointError(f"{self.path}: no tensor {name!r}{hint}") from None

    def _shard(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.path / file}: not readable as safetensors ({error})") from error
        return self._open[file]

    @cached_property
    def _weight_map(self) -> dict[str, str] | None:
        """The index's tensor -> shard map; None for a single file."""
        if (self.path / SINGLE).is_file() or not (self.path / INDEX).is_file():
            return None
        where = self.path / INDEX
        found = read_json(where, "expected the shard index").get("weight_map")
        if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
            raise CheckpointError(f"{where}: no usable `weight_map`; expected tensor name -> shard file")
        outside = [v for v in found.values() if Path(v).name != v]
        if outside:
            raise CheckpointError(f"{where}: shard {outside[0]!r} lies outside the folder; expected a file name")
        return found

    @cached_property
    def _shards(self) -> tuple[str, ...]:
        _ = self.config  # a missing folder is told as such
        if self._weight_map is None:
            if not (self.path / SINGLE).is_file():
                raise CheckpointError(_no_weights(self.path))
            return (SINGLE,)
        shards = tuple(sorted(set(self._weight_map.values())))
        absent = [s for s in shards if not (self.path / s).is_file()]
        if absent:
            raise CheckpointError(
                f"{self.path / INDEX}: names {absent[0]}, which is missing ({len(absent)} of {len(shards)}"
                f" shards absent): the download is incomplete; get the missing files"
            )
        return shards

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for shard in self._shards:
            for name, entry in read_header(self.path / shard).items():
                if name in entries:
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r} is in both {entries[name].file} and {shard};"
                        f" expected it once. Remove files of another download"
                    )
                entries[name] = entry
        for problem in _disagreements(self._weight_map, entries):
            raise CheckpointError(f"{self.path / INDEX}: {problem}; index and shards do not belong together")
        return dict(sorted(entries.items()))


def _disagreements(weight_map: dict[str, str] | None, entries: dict[str, Entry]) -> Iterator[str]:
    """Where the index and the shards' own headers differ."""
    if weight_map is None:
        return
    for name, shard in sorted(weight_map.items()):
        if name not in entries:
            yield f"lists tensor {name!r} in {shard}, which does not hold it"
        elif entries[name].file != shard:
            yield f"lists tensor {name!r} in {shard}, but it is in {entries[name].file}"
    for name in sorted(entries.keys() - weight_map.keys()):
        yield f"does not list tensor {name!r} of {entries[name].file}"


def _no_config(path: Path) -> str:
    """What to tell about a folder that is no checkpoint, by what it is instead."""
    if (path / ADAPTER).is_file():
        return (
            f"{path}: is an adapter ({ADAPTER}), not a model; merge it into its base first, with peft:"
            f" `model.merge_and_unload().save_pretrained(new_folder)`"
        )
    steps = [int(p.name.removeprefix(STEP)) for p in path.glob(f"{STEP}*") if p.name.removeprefix(STEP).isdigit()]
    if steps:
        return f"{path / CONFIG}: missing; did you mean {path / STEP}{max(steps)}?"
    if gguf := sorted(path.glob("*.gguf")):
        return f"{path}: holds {gguf[0].name}, a format that is not read; expected the model that it was made from"
    return f"{path / CONFIG}: missing; expected a Hugging Face checkpoint folder with this file"


def _no_weights(path: Path) -> str:
    """What to tell about a folder without safetensors weights."""
    here = sorted(p.name for p in path.iterdir() if p.is_file())
    loose = [n for n in here if n.endswith(".safetensors")]
    pickled = [n for n in here if n.endswith((".bin", ".pt", ".pth"))]
    if loose:
        return (
            f"{path}: has {loose[0]} but neither {SINGLE} nor {INDEX}; expected one of them."
            f" If the download is incomplete, get the index file"
        )
    if pickled:
        return (
            f"{path}: weights are in {pickled[0]}, a format that can run code and is not read here; convert:"
            f" `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)` writes safetensors"
        )
    return f"{path}: no weights; expected {SINGLE}, or {INDEX} and its shards"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_READ):
            digest.update(chunk)
    return digest.hexdigest()
