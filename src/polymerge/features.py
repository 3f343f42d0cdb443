"""Features: the owner's states, to which healing holds the result's between its layers.

After a fold every expert has a slice of the result's residual stream, where its own state stands, encoded by P_k
(`align/width.py`). So the owner of a text can teach not only what it predicts but what it computes on the way, with no
projection to be learned first (FitNets: Romero et al. 2015; of language models, TinyBERT: Jiao et al. 2020).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polymerge.align.width import heed

FILE = "features.safetensors"


@dataclass(frozen=True)
class Features:
    """Where one expert's states stand in a folded model.

    Attributes:
        encoder: Pᵀs is what the slice holds where the expert's state is s.
        start: the slice's first dimension of the stream.
        layers: (layer of the result, the last layer of the expert that it or one before it hosts). The result's last
            layer is not among them, nor is the expert's: what comes after these has no state of its own to show.
        centred: whether s is without its mean, as LayerNorm reads it.
    """

    encoder: Float[Tensor, "resid slice"]
    start: int
    layers: tuple[tuple[int, int], ...]
    centred: bool = False

    def missed(
        self,
        result: Sequence[Float[Tensor, "row time width"]],
        expert: Sequence[Float[Tensor, "row time resid"]],
        known: Bool[Tensor, "row time"] | None = None,
    ) -> Float[Tensor, ""]:
        """Σ over positions of the mean over layers of |slice − Pᵀs|² ⁄ mean |Pᵀs|², weighted by `heed`.

        Differentiable in `result`. Both are the `hidden_states` of a transformers model: the embeddings, then what each
        layer puts out. `known`: the positions at which the expert has a state; None: all.
        """
        if known is not None:
            result, expert = ([state[known] for state in states] for states in (result, expert))
        total = torch.zeros((), device=result[0].device)
        end = self.start + self.encoder.shape[1]
        for mine, theirs in self.layers:
            state = expert[theirs + 1].float()
            state = state - state.mean(-1, keepdim=True) if self.centred else state
            goal, weight = state @ self.encoder, heed(state.pow(2).mean(-1))
            error = (result[mine + 1][..., self.start : end].float() - goal).pow(2).mean(-1) * weight
            total = total + error.sum() / (goal.pow(2).mean(-1) * weight).mean().clamp_min(1e-12)
        return total / len(self.layers)

    def to(self, device: Any) -> "Features":
        """The same on a device, in float32."""
        return replace(self, encoder=self.encoder.to(device, torch.float32))

    @property
    def operations(self) -> int:
        """Of the products that a position takes."""
        return 2 * self.encoder.numel() * len(self.layers)

    def digest(self) -> str:
        """Hash of all that `missed` depends on."""
        about = f"{tuple(self.encoder.shape)} {self._rest()}".encode()
        return hashlib.sha256(about + self.encoder.float().contiguous().cpu().numpy().tobytes()).hexdigest()

    def _rest(self) -> dict[str, Any]:
        return {"start": self.start, "layers": self.layers, "centred": self.centred}

    @staticmethod
    def save(found: Mapping[str, "Features"], folder: Path) -> None:
        """Write those of each expert into a folder."""
        from safetensors.torch import save_file

        rest = {name: one._rest() for name, one in found.items()}  # noqa: SLF001
        tensors = {name: one.encoder.contiguous().cpu() for name, one in found.items()}
        save_file(tensors, folder / FILE, metadata={"features": json.dumps(rest)})

    @staticmethod
    def load(folder: Path) -> dict[str, "Features"]:
        """Those of each expert from a folder; none where it has none."""
        from safetensors import safe_open

        if not (folder / FILE).is_file():
            return {}
        with safe_open(folder / FILE, "pt") as file:
            rest = json.loads(file.metadata()["features"])
            return {
                name: Features(file.get_tensor(name), r["start"], tuple(map(tuple, r["layers"])), r["centred"])
                for name, r in rest.items()
            }
