"""Experts that read another tokenizer: they are given the anchor's rows and answer in the anchor's tokens."""

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymerge.align.translate import Reading, Translator
from polymerge.errors import PreflightError
from polymerge.model.source import Source

CUT, BATCH = 0.05, 32
"""Rows that may be too long for an expert, as a share of that many or more."""


class Foreign:
    """An expert behind a `Translator`; scores rows of anchor tokens as `Source` scores its own."""

    def __init__(self, name: str, source: Source, translator: Translator) -> None:
        self.name, self.source, self.translator = name, source, translator
        self.dtype = source.dtype

    def read(self, tokens: Int[Tensor, "row time"]) -> Reading:
        """The expert's reading of rows; raises PreflightError where many are longer than its positions."""
        limit, length = self.source.spec.max_positions, tokens.shape[1]
        reading = self.translator.read(tokens, limit)
        cut = float((reading.lengths >= limit).float().mean())
        if len(tokens) >= BATCH and cut > CUT:
            raise PreflightError(
                f"{self.name}: {cut:.0%} of the rows of {length} tokens are more than its {limit} positions in its own "
                f"tokenizer; set fold.length and heal.length to {length // 2}"
            )
        return reading

    def log_probs(self, tokens: Int[Tensor, "row time"], batch: int = 32) -> Float[Tensor, "row next"]:
        """Log q(next anchor token) at every position but the last."""
        scores = []
        for rows in tokens.split(batch):
            reading = self.read(rows)
            found = self.source.logits(reading.tokens.to(self.source.device)).log_softmax(-1)
            logs = self.translator.project(found, reading, rows)[:, :-1]
            scores.append(logs.gather(-1, rows[:, 1:, None].to(logs.device))[..., 0].cpu())
        return torch.cat(scores)


class TranslatedTeacher(nn.Module):
    """A transformers model that teaches in the anchor's tokens: `logits` are log q."""

    def __init__(self, model: Any, foreign: Foreign) -> None:
        super().__init__()
        self.model, self.foreign = model, foreign

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def forward(
        self, input_ids: Int[Tensor, "row time"], guess: Float[Tensor, "row time vocab"] | None = None, **_: Any
    ) -> SimpleNamespace:
        """Distributions over the result's tokens (row, time, vocab); `guess`: see `Translator.project`."""
        rows = input_ids.cpu()
        reading = self.foreign.read(rows)
        found = self.model(input_ids=reading.tokens.to(self.device), use_cache=False).logits.float().log_softmax(-1)
        return SimpleNamespace(logits=self.foreign.translator.project(found, reading, rows, guess))
