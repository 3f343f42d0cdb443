"""Experts that read another tokenizer: they are given the result's rows and answer in the result's tokens."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymerge.align.translate import Reading, Translator
from polymerge.errors import PreflightError
from polymerge.model import decoder
from polymerge.model.source import Source

CUT, BATCH = 0.05, 32
"""Rows that may be too long for an expert, as a share of that many or more."""


class Foreign:
    """An expert behind a `Translator`; scores rows of the result's tokens as `Source` scores its own."""

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

    @torch.no_grad()
    def log_probs(self, tokens: Int[Tensor, "row time"], batch: int = 32) -> Float[Tensor, "row next"]:
        """Log q(the result's next token) at every position but the last."""
        scores = []
        for rows, reading, found in self._read_by_expert(tokens, batch):
            logs = self.translator.project(found, reading, rows)[:, :-1]
            scores.append(logs.gather(-1, rows[:, 1:, None].to(logs.device))[..., 0].cpu())
        return torch.cat(scores)

    @torch.no_grad()
    def told(self, tokens: Int[Tensor, "row time"]) -> tuple[float, float]:
        """Bits per byte of rows by the expert's own tokens, and by what it tells of the result's before they are seen.

        Both over the same bytes: of each row those between the first and the last place where both have a token end.
        """
        own = told = size = 0.0
        lengths = torch.tensor([0 if s else len(b) for s, b in zip(
            self.translator.anchor.special, self.translator.anchor.surface, strict=True)])  # fmt: skip
        for rows, reading, logs in self._read_by_expert(tokens, BATCH):
            found = logs.cpu()
            q = self.translator.project(found, reading, rows, seen=False)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
            p = found[:, :-1].gather(-1, reading.tokens[:, 1:, None])[..., 0]
            for row, exact in enumerate(reading.exact & (reading.last >= 0)):
                ends = torch.nonzero(exact).flatten().tolist()
                if len(ends) > 1:
                    first, last = ends[0], ends[-1]
                    told -= float(q[row, first:last].sum())
                    own -= float(p[row, int(reading.last[row, first]) : int(reading.last[row, last])].sum())
                    size += float(lengths[rows[row, first + 1 : last + 1]].sum())
        bits = math.log(2) * max(1.0, size)
        return own / bits, told / bits

    def _read_by_expert(
        self, tokens: Int[Tensor, "row time"], batch: int
    ) -> Iterator[tuple[Tensor, Reading, Float[Tensor, "row own vocab"]]]:
        """Batches of rows, their reading, and the expert's log-probabilities; each layer is read once for all."""
        batches, outer = tokens.split(batch), self.source.outer()
        readings = [self.read(rows) for rows in batches]
        states = self.source.states(outer, [reading.tokens for reading in readings])
        for rows, reading, x in zip(batches, readings, states, strict=True):
            yield rows, reading, decoder.logits(self.source.spec, outer, x).log_softmax(-1)


class TranslatedTeacher(nn.Module):
    """A transformers model that teaches in the result's tokens: `logits` are log q."""

    def __init__(self, model: Any, foreign: Foreign) -> None:
        super().__init__()
        self.model, self.foreign = model, foreign

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def forward(
        self,
        input_ids: Int[Tensor, "row time"],
        guess: Float[Tensor, "row time vocab"] | None = None,
        *,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> SimpleNamespace:
        """Distributions over the result's tokens (row, time, vocab); `guess`: see `Translator.project`.

        With `output_hidden_states` the expert's states as well, each paired with the result's tokens, and `known` (row,
        time): the positions that end where a token of the expert's own does, and so have one.
        """
        rows = input_ids.cpu()
        reading = self.foreign.read(rows)
        out = self.model(
            input_ids=reading.tokens.to(self.device), use_cache=False, output_hidden_states=output_hidden_states
        )
        told = self.foreign.translator.project(out.logits.float().log_softmax(-1), reading, rows, guess)
        states = tuple(reading.paired(state, rows.shape[1]) for state in out.hidden_states or ())
        known = (reading.exact & (reading.last >= 0)).to(self.device)
        return SimpleNamespace(logits=told, hidden_states=states, known=known)
