"""mergekit as an external peer: its own command, run on the same checkpoints, for experts of one architecture.

The command is `mergekit-yaml` on the PATH, or what POLYMERGE_MERGEKIT names (mergekit is LGPL and no dependency of
polymerge: `pip install mergekit`). Equal weights; where architectures differ, its own error is the row's reason.

    mergekit_linear            Σ_k w_k W_k                                   (model soups: Wortsman et al. 2022)
    mergekit_slerp             the great circle between two experts, half way  (Shoemake 1985)
    mergekit_task_arithmetic   W_0 + Σ_k (W_k − W_0)                         (Ilharco et al., ICLR 2023)
    mergekit_ties              task vectors trimmed, signs elected           (Yadav et al., NeurIPS 2023)
    mergekit_dare              task vectors thinned at random and rescaled   (Yu et al., ICML 2024)
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from polymerge.errors import PreflightError

COMMAND, VARIABLE = "mergekit-yaml", "POLYMERGE_MERGEKIT"
LIMIT = 600
"""Seconds that one merge may take."""
METHODS: dict[str, tuple[str, str]] = {
    "mergekit_linear": ("peer", "mergekit's linear average of equal architectures"),
    "mergekit_slerp": ("peer", "mergekit's spherical interpolation between two experts"),
    "mergekit_task_arithmetic": ("peer", "mergekit's sum of task vectors"),
    "mergekit_ties": ("peer", "mergekit's TIES, half of each task vector kept"),
    "mergekit_dare": ("peer", "mergekit's DARE, half of each task vector kept"),
}
TASK_VECTORS = {"mergekit_task_arithmetic": "task_arithmetic", "mergekit_ties": "ties", "mergekit_dare": "dare_linear"}
"""Methods that subtract a common base model, and mergekit's names of them."""
TRIED = (1.0, 0.7, 0.4)
"""Scales of the merged task vector (mergekit's lambda) from which validation text chooses."""


def tries(name: str) -> dict[str, float]:
    """What a method is tried with: in words, and the scale of its task vector."""
    if name not in TASK_VECTORS:
        return {"t 0.5" if name == "mergekit_slerp" else "equal weights": 1.0}
    more = "" if name == "mergekit_task_arithmetic" else ", density 0.5"
    return {f"weight 1 each{more}, scale {scale:g}": scale for scale in TRIED}


def command() -> str:
    """The `mergekit-yaml` to run. Raises PreflightError where there is none."""
    found = os.environ.get(VARIABLE) or shutil.which(COMMAND)
    if not found:
        raise PreflightError(f"mergekit is not installed (pip install mergekit, or name its {COMMAND} in {VARIABLE})")
    return found


def config(
    name: str,
    experts: Sequence[Path],
    base: Path | None = None,
    weights: Sequence[float] = (),
    scale: float = 1.0,
    *,
    tokenizer: Path | None = None,
) -> Any:
    """What mergekit reads; `scale`: of the merged task vector; `tokenizer`: whose the result takes, if they differ.

    Raises PreflightError where experts do not fit.
    """
    spoken = {"tokenizer": {"source": str(tokenizer.absolute())}} if tokenizer else {}
    models: list[dict[str, Any]] = [{"model": str(path.absolute())} for path in experts]
    equal = 1 / len(experts) if name == "mergekit_linear" else 1.0
    shares = list(weights) or [equal] * len(experts)
    if name == "mergekit_slerp":
        if len(experts) != 2:  # noqa: PLR2004  a great circle has two ends
            raise PreflightError(f"slerp is between two experts; here are {len(experts)}")
        more = {"merge_method": "slerp", "base_model": models[0]["model"], "parameters": {"t": 0.5}}
        return {"models": models, "dtype": "float32", **more, **spoken}
    if name == "mergekit_linear":
        weighted = [m | {"parameters": {"weight": w}} for m, w in zip(models, shares, strict=True)]
        return {"models": weighted, "dtype": "float32", "merge_method": "linear", **spoken}
    if base is None:
        raise PreflightError("it adds differences to a common base model, and these experts have none")
    kept = {} if name == "mergekit_task_arithmetic" else {"density": 0.5}
    weighted = [m | {"parameters": {"weight": w, **kept}} for m, w in zip(models, shares, strict=True)]
    method = {
        "merge_method": TASK_VECTORS[name], "base_model": str(base.absolute()), "parameters": {"lambda": scale},
    }  # fmt: skip
    return {"models": weighted, "dtype": "float32", **method, **spoken}


def merge(
    name: str,
    experts: Sequence[Path],
    out: Path,
    *,
    base: Path | None = None,
    weights: Sequence[float] = (),
    scale: float = 1.0,
    seed: int = 0,
    speaker: int | None = None,
) -> Path:
    """Let mergekit merge checkpoint folders into the folder `out`, which is returned.

    `speaker`: the expert whose tokenizer the result takes, where they differ; mergekit then maps the embeddings.
    Raises PreflightError, with mergekit's own last line, where it cannot.
    """
    # By links: mergekit takes what follows an @ in a path for a revision.
    paths = [*experts, base] if base else list(experts)
    links = [out / f"expert-{k}" for k in range(len(paths))]
    spoken = None if speaker is None else links[speaker]
    asked = config(name, links[: len(experts)], links[-1] if base else None, weights, scale, tokenizer=spoken)
    program = command()
    out.mkdir(parents=True)
    for link, path in zip(links, paths, strict=True):
        link.symlink_to(path.resolve(), target_is_directory=True)
    recipe = out / "mergekit.yaml"
    recipe.write_text(yaml.safe_dump(asked), encoding="utf-8")
    words = [program, str(recipe), str(out / "model"), "--no-copy-tokenizer", "--no-write-model-card"]
    words += ["--random-seed", str(seed)]
    # Sources are kept in a set there: results depend on the hash seed. Nothing is asked of the network.
    environment = os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(  # noqa: S603  the user's own mergekit
            words, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except OSError as error:
        raise PreflightError(f"mergekit: {program}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise PreflightError(f"mergekit: not done after {LIMIT} seconds") from None
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise PreflightError(f"mergekit: {said[-1] if said else f'exit code {done.returncode}'}")
    return out / "model"
