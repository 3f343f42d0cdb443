"""What a union remembers of a text while it writes: every expert's cache, and the gate. It travels with checkpoints.

Shapes: B batch, K experts, V the anchor's vocabulary, n pending tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class UnionCache(Cache):  # type: ignore[misc]
    """One KV cache per expert, and the gate's state.

    `lag[k]` counts the tokens that expert k, asleep, has not read. All tensors have the batch first:

    - `gate`: `log_weights` (B, K) in use at the last position; `real` (B,), whether that position held a
      token and not padding; `base` (B, K), the log weights before the pending tokens.
    - `last[k]`: expert k's log-probabilities (B, V) of the next token.
    - `pending`: all that was read since somebody slept, which waking up needs: `ids`, `positions`, `scored`
      (B, n), and `evidence` (B, n, K), NaN where an expert slept.
    """

    def __init__(self, experts: Sequence[Any]) -> None:
        super().__init__(layers=[])
        self.experts = list(experts)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was read."""
        for expert in self.experts:
            if expert is not None:
                expert.reset()
        self.length, self.lag = 0, [0] * len(self.experts)
        self.gate: dict[str, Tensor] = {}
        self.last: dict[int, Tensor] = {}
        self.pending: dict[str, Tensor] = {}

    def append(self, **new: Tensor) -> None:
        """Add pending tokens."""
        for name, tensor in new.items():
            self.pending[name] = torch.cat([self.pending[name], tensor], 1) if name in self.pending else tensor

    def forget_pending(self) -> None:
        """Everybody has read everything."""
        self.gate["base"], self.lag, self.pending = self.gate["log_weights"], [0] * len(self.experts), {}

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.gate = {name: change(tensor) for name, tensor in self.gate.items()}
        self.last = {k: change(tensor) for k, tensor in self.last.items()}
        self.pending = {name: change(tensor) for name, tensor in self.pending.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order (beam search)."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        for expert in self.experts:
            expert.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows of the batch."""
        self._each(lambda tensor: tensor[indices.to(tensor.device)])
        for expert in self.experts:
            expert.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))
        for expert in self.experts:
            expert.batch_repeat_interleave(repeats)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the base class's signature
        """Tokens read, padding included; what sleeping experts have yet to read counts as well."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002 - the base class's signature
        """-1: no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: the gate does not keep its past states."""
        if tokens_to_remove:
            raise NotImplementedError("a union's cache cannot be shortened; start again from an empty cache")

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can undo tokens: no."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Of each expert, whether it keeps a state of fixed size in place of keys and values: none does."""
        return [False] * len(self.experts)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.length > 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first call."""
        return self.gate["log_weights"].shape[0] if self.gate else -1

    def __len__(self) -> int:
        return len(self.experts)
