"""Experts made comparable: same kind of heads, γ absorbed, layers spread over the target's; nothing computed differs.

What a cross-architecture rival needs before it can align anything, in exact steps only (see `_pad.py`): heads of the
target's size and rotary frequencies, KV groups of the target's ratio (KV heads repeated), eps brought to the
target's, RMSNorm's γ multiplied into the maps that read the norm. Width, neurons and number of groups stay the
expert's own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil, inf

import torch
from jaxtyping import Int
from torch import Tensor

from polymerge.align import depth
from polymerge.align.transport import plan
from polymerge.calibrate.calibration import Calibration
from polymerge.errors import PreflightError
from polymerge.methods._pad import _check, _Padding, unlike
from polymerge.model import decoder
from polymerge.model.source import Source
from polymerge.model.spec import Spec

ROW = 128
"""Tokens of a row, as methods and their options count rows: text that is cut shorter is no less text."""
READERS = {"norm1": ("q", "k", "v"), "norm2": ("gate", "up")}


def alignable(spec: Spec, target: Spec) -> bool:
    """Whether an expert's weights can stand beside the target's one to one: llama-like, and no feature apart."""
    return spec.llama_like and not unlike(spec, target)


class Lifted:
    """An expert in the target's head layout; `hosts[i]` is the target layer of its layer i.

    Raises PreflightError for what cannot be lifted: LayerNorm, learned positions, plain MLP, parallel blocks, larger
    heads or more layers than the target's, another vocabulary, biases that the target cannot hold.
    """

    def __init__(self, source: Source, target: Spec, *, absorb: bool = True) -> None:
        own = source.spec
        if not own.llama_like:
            raise PreflightError(
                f"{source.path}: {own.family} is not llama-like (RMSNorm, rotary positions, gated MLP), and this method"
                " aligns weights one to one: leave the expert out, or use the fold"
            )
        if own.layers > target.layers:
            raise PreflightError(
                f"{source.path}: {own.layers} layers do not fit into the target's {target.layers}; choose more layers"
            )
        ratio = target.heads // target.kv_heads
        groups = own.kv_heads * ceil(own.heads // own.kv_heads / ratio)
        self.source, self.target, self.absorb = source, target, absorb
        self.spec = replace(
            target, width=own.width, mlp=own.mlp, layers=own.layers, heads=groups * ratio, kv_heads=groups
        )
        try:
            _check(own, self.spec, inf)
        except PreflightError as error:
            raise PreflightError(f"{source.path}: {str(error).replace('the anchor', 'the expert')}") from None
        self.hosts = depth.spread(own.layers, target.layers)
        self._padding = _ZeroPadding(own, self.spec, torch.Generator())
        self.tied_gain = self._padding.stream**-2

    @property
    def groups(self) -> int:
        """KV groups."""
        return self.spec.kv_heads

    def outer(self) -> dict[str, Tensor]:
        """Embedding, final norm (ones where absorbed) and head."""
        outer = self.source.outer()
        gamma, head = outer["norm.weight"], outer["head.weight"]
        embed = outer["embed.weight"] * self._padding.stream
        # A tied head cannot absorb γ: the embedding would have to.
        if self.absorb and not self.target.tied:
            head, gamma = head * gamma, torch.ones_like(gamma)
        return {"embed.weight": embed, "norm.weight": gamma, "head.weight": head}

    def layer(self, index: int) -> dict[str, Tensor]:
        """Weights of the expert's own layer `index`, all roles of the target's family."""
        weights = self._padding._layer(self.source.layer(index))  # noqa: SLF001 - the same exact steps as the control
        if self.absorb:
            for norm, readers in READERS.items():
                gamma = weights[f"{norm}.weight"]
                weights |= {f"{role}.weight": weights[f"{role}.weight"] * gamma for role in readers}
                weights[f"{norm}.weight"] = torch.ones_like(gamma)
        return weights

    def at(self, host: int) -> dict[str, Tensor] | None:
        """Weights of what the expert does in target layer `host`; None where it is the identity."""
        return self.layer(self.hosts.index(host)) if host in self.hosts else None


class _ZeroPadding(_Padding):
    """Padding whose new readers are zero, so that averages stay clean."""

    def _reader(self, x: Tensor, rows: Tensor, total: int) -> Tensor:
        out = x.new_zeros(total, self.target.width)
        out[rows, : self.spec.width] = x
        return out


class Changed(Lifted):
    """A lifted expert whose weights went through `change(layer, weights)`; layer None: what is outside the layers."""

    def __init__(self, expert: Lifted, change: Callable[[int | None, dict[str, Tensor]], dict[str, Tensor]]) -> None:
        vars(self).update(vars(expert))
        self._expert, self._change = expert, change

    def outer(self) -> dict[str, Tensor]:
        """Outside the layers, changed."""
        return self._change(None, self._expert.outer())

    def layer(self, index: int) -> dict[str, Tensor]:
        """A layer, changed."""
        return self._change(index, self._expert.layer(index))


def lift(experts: Sequence[Source], target: Spec, *, absorb: bool = True) -> list[Lifted]:
    """All experts, or PreflightError for the first that cannot be."""
    return [Lifted(e, target, absorb=absorb) for e in experts]


def shares(weights: Sequence[float], experts: int) -> list[float]:
    """Weights of the experts, summing to 1; equal where none are given."""
    if not weights:
        return [1 / experts] * experts
    if len(weights) != experts or min(weights) < 0 or sum(weights) <= 0:
        raise PreflightError(
            f"weights: {list(weights)} for {experts} experts; give one number ≥ 0 each, in the recipe's order"
        )
    return [w / sum(weights) for w in weights]


def hold(expert: Lifted, target: Spec) -> None:
    """Raise PreflightError unless every dimension, neuron and KV group of an expert has its own place in the target."""
    for what, own, room in (
        ("width", expert.spec.width, target.width),
        ("MLP neurons", expert.spec.mlp, target.mlp),
        ("KV groups", expert.groups, target.kv_heads),
    ):
        if own > room:
            raise PreflightError(
                f"{expert.source.path}: {what}: {own} do not fit into the target's {room}, and this method only pads;"
                " choose a larger size, or the fold"
            )


def plan_of(cost: Tensor, epsilon: float) -> Tensor:
    """A transport plan; PreflightError where the exact one (epsilon 0) is out of reach."""
    try:
        return plan(cost, epsilon)
    except ValueError as error:
        raise PreflightError(f"epsilon: {epsilon}: {error}") from None


def as_rows(rows: int, tokens: Int[Tensor, "row time"]) -> int:
    """How many rows of the tokens' length have as many tokens as so many rows of `ROW`: what methods count in."""
    return max(1, rows * ROW // tokens.shape[1])


def rows_of_all(texts: Calibration, limit: int) -> Int[Tensor, "row time"]:
    """Fitted rows, of at most so many tokens as `limit` rows of `ROW` have, evenly from all owners."""
    each = max(1, as_rows(limit, texts.tokens) // len(texts.owned))
    return torch.cat([texts.of(k)[:each] for k in range(len(texts.owned))])


class Walk:
    """All experts side by side through the target's layers, on the same tokens, batch by batch."""

    def __init__(self, lifted: Sequence[Lifted], tokens: Int[Tensor, "row time"], batch: int = 32) -> None:
        self.lifted = list(lifted)
        self.tokens = tokens.split(as_rows(batch, tokens))
        self.states = [
            [decoder.embed(e.spec, outer, rows.to(e.source.device)) for rows in self.tokens]
            for e, outer in ((e, e.outer()) for e in self.lifted)
        ]

    def layer(self, host: int) -> Iterator[dict[int, decoder.Trace]]:
        """Traces of the experts that have a layer here, one batch after the other; moves the states past it."""
        present = {k: w for k, e in enumerate(self.lifted) if (w := e.at(host)) is not None}
        for b in range(len(self.tokens)):
            traces = {k: decoder.layer(self.lifted[k].spec, w, self.states[k][b]) for k, w in present.items()}
            for k, trace in traces.items():
                self.states[k][b] = trace.out
            yield traces
