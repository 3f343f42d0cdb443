"""The fold's engine: one target, layer by layer, in closed form and closed loop (see `fold.py` for the method).

The target's states (row, time, width) are kept whole where the experts' are (`_experts.py`). Batches of rows go to the
device; one layer of each model is there at a time.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from polymerge.align import depth, width
from polymerge.align.heads import expand_groups, placement
from polymerge.align.prune import members
from polymerge.calibrate.calibration import Calibration
from polymerge.calibrate.moments import Moments
from polymerge.clock import Clock
from polymerge.features import Features
from polymerge.methods import _judge, _refine, _writers
from polymerge.methods._experts import At, Experts, Present
from polymerge.model import decoder
from polymerge.model.source import Source
from polymerge.model.spec import Spec

Emit = Callable[[int | None, dict[str, Tensor]], None]
Make = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Knobs:
    """The seven knobs of the fold.

    `ridge` λ, relative to the mean of the Gram diagonal; `mute` μ, the weight of silence where an expert does not own
    the position; `mute_last`, the same after the last MLP: the head reads every slice, and what another expert says is
    as wrong there as an error of the owner's; `off_gate` M: the gate is −M where an expert does not own the position;
    `off_weight`, the weight of that target; `even`, the part of the stream's dimensions that is dealt out by the
    experts' widths and not by score; `hosts`, the rule by which the layers of a shallower expert are placed.
    """

    ridge: float = 1e-4
    mute: float = 0.03
    mute_last: float = 0.3
    off_gate: float = 0.0
    off_weight: float = 0.1
    even: float = 0.0
    hosts: str = "ends"


class LayerFold:
    """One fold of `experts` into `target`; `run` emits the target's weights and returns what it costs each skill."""

    def __init__(
        self,
        experts: Sequence[Source],
        target: Spec,
        texts: Calibration,
        bases: Sequence[width.Basis],
        knobs: Knobs,
        refine: _refine.Refine,
        *,
        bias: frozenset[str] = frozenset(),
        balance: Sequence[float] | None = None,
        seed: int = 0,
        batch: int = 32,
        progress: Callable[[str], None] = lambda _: None,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.target, self.texts, self.bases, self.knobs = target, texts, bases, knobs
        self.refine, self.bias, self.batch, self.progress = refine, bias, batch, progress
        self.device, self.dtype = experts[0].device, experts[0].dtype
        self.generator = torch.Generator().manual_seed(seed)
        hosts = [depth.spread(e.spec.layers, target.layers, knobs.hosts) for e in experts]
        self.experts = Experts(experts, target, texts, hosts, batch)
        self.placements = [[placement(e.spec.at(i), target) for i in range(e.spec.layers)] for e in experts]
        self.ratio = target.heads // target.kv_heads
        self.constant = width.has_constant([e.spec for e in experts], target.width)
        self.balance = tuple(balance) if balance is not None else (1.0,) * len(experts)
        self.scales = [b.scale / max(other.scale for other in bases) for b in bases]
        self.encoders, self.slices = width.encoders(
            bases, self.scales, self.balance, target.width, self.dtype, first=int(self.constant), even=knobs.even
        )
        self.mute = knobs.mute
        self.heard = torch.ones_like(texts.scored, dtype=torch.bool)  # positions whose states anything still reads
        self.state = self.weight = self.heed = torch.empty(0)
        agree = torch.stack([(texts.owner == k).to(self.dtype) for k in range(len(experts))])
        self.say = texts.owned.to(self.dtype) * (0.5 + 0.5 * agree[:, :, None])  # weight of each expert where it speaks
        for k in range(len(experts)):
            if (foreign := texts.reading(k)) is not None:  # inside its tokens an expert has no state to aim at
                self.say[k] *= foreign[0].exact
        self.weight = self.say * texts.fit[None, :, None]

    @torch.no_grad()
    def run(self, emit: Emit) -> list[float]:
        """Fold; what each expert's held-out rows lost (`_judge.lag`)."""
        with self.clock("fold"):
            emit(None, {"embed.weight": self.embeddings()})
            last = self.target.layers - 1
            for layer in range(self.target.layers):
                self.progress(f"layer {layer + 1} of {self.target.layers}")
                before, weights = self.state, self.layer(layer)
                if layer < last:
                    emit(layer, weights)
            self.progress("head")
            outer = self.head()
            if self.refine.steps:
                with self.clock("refine"):
                    weights, outer["head.weight"] = _refine.ending(self, before, weights, outer["head.weight"])
                self._pass(before, weights)
            emit(last, weights)
            emit(None, outer)
            return _judge.lag(self, outer["head.weight"])

    def features(self) -> list[Features | None]:
        """Where each expert's states stand in the target; None where no layer but the last has any to compare."""
        found: list[Features | None] = []
        for k, (encoder, part) in enumerate(zip(self.encoders, self.slices, strict=True)):
            source, hosts = self.experts.sources[k], self.experts.hosts[k]
            layers = [(at, bisect_right(hosts, at) - 1) for at in range(self.target.layers - 1)]
            layers = [(at, i) for at, i in layers if 0 <= i < source.spec.layers - 1]
            centred = source.spec.norm == "layer"
            found.append(Features(encoder[:, part], part.start, tuple(layers), centred) if layers else None)
        return found

    def layer(self, index: int) -> dict[str, Tensor]:
        """One target layer: attention, MLP, then both refined together."""
        present = self.experts.hosted(index)
        before = self.state
        weights = self.attention(index, present) | self.feed_forward(index, present)
        if self.refine.steps:
            with self.clock("refine"):
                weights = _refine.block(self, before, weights)
            self._pass(before, weights)
        return weights

    # ------------------------------------------------------------------------------------------ stages

    def embeddings(self) -> Tensor:
        """E' = Σ_k E_k P_k, and a constant where one is needed, over known tokens; sets the first states."""
        texts, target = self.texts, self.target
        counts = torch.stack(
            [torch.bincount(texts.of(k).flatten(), minlength=target.vocab) for k in range(len(self.experts))]
        )
        # An expert is quiet on tokens that it has not seen and others have; on tokens new to all, everyone speaks.
        known = torch.where(counts > 0, 1.0, 1.0 / (1.0 + counts.amax(0))).to(self.dtype)
        table = torch.zeros(target.vocab, target.width, dtype=self.dtype)
        for k in range(len(self.experts)):
            table += known[k][:, None] * self.experts.vectors(k, target.vocab) @ self.encoders[k]
        if self.constant:
            if target.width > sum(e.spec.width for e in self.experts.sources):  # all fits: no louder than needed
                table[:, 0] = table[texts.tokens[texts.fit]].pow(2).mean().sqrt()
            else:
                table[:, 0] = max(b.scale for b in self.bases) * (width.STEADY * target.width) ** 0.5
        self.state = F.embedding(texts.tokens, table).to(self.experts.home)
        return table

    def attention(self, layer: int, present: Present) -> dict[str, Tensor]:
        """Solve q, k, v, then o, of a target layer; moves all states past the attention.

        Where it hosts several layers of an expert, all their heads read what the first of them reads.
        """
        target, size, ratio = self.target, self.target.head_size, self.ratio
        groups = {at: self.experts.spec(at[0]).heads // ratio for at in present}
        inputs = target.width + bool(self.bias)
        fits = {at: Moments.zeros(inputs, groups[at] * (ratio + 2) * size, self.device) for at in present}
        for at, rows, time, heads in self.experts.attention(present):
            k, seen = at[0], self._with_one(self.normalised(rows, time))
            values = self.experts.paired(k, rows, self._placed(at, *heads), time)
            self._add(fits[at], seen, values, self.weight[k][rows, :time])
        parts = [
            fits[at].solve(self.knobs.ridge).to(self.dtype).split([g * ratio * size, g * size, g * size], dim=1)
            for at, g in groups.items()
        ]
        total = sum(groups.values())
        if (spare := max(0, target.kv_heads - total)) > 0:
            parts.append(self._random(inputs, spare * (ratio + 2) * size).split(
                [spare * ratio * size, spare * size, spare * size], dim=1))  # fmt: skip
            total += spare
        weights = self._named(
            {role: torch.cat(p, dim=1) for role, p in zip("qkv", zip(*parts, strict=True), strict=True)}
        )
        if layer == target.layers - 1:
            self.heard = self.texts.scored.bool()
        wide = replace(target, heads=total * ratio, kv_heads=total)
        if "qk_norm" in target.features:
            weights |= self._norms(weights, present)
        self.heed = self._heed()
        writers = _writers.moments(self, lambda rows: self._mixed(wide, weights, rows), total * ratio * size)
        keep = _writers.kept(self, writers, layer, "mid", ratio * size, target.kv_heads)
        for role, per in (("q", ratio * size), ("k", size), ("v", size)):
            for name in (f"{role}.weight", f"{role}.bias"):
                if name in weights:
                    weights[name] = weights[name][members(keep, per)].contiguous()
        weights["o.weight"] = _writers.solved(self, writers, members(keep, ratio * size))
        ones = torch.ones(target.width, dtype=self.dtype, device=self.device)
        weights |= {"norm1.weight": ones, "norm2.weight": ones.clone()}
        self._advance(lambda rows: self._mixed(target, weights, rows), weights["o.weight"])
        return weights

    def feed_forward(self, layer: int, present: Present) -> dict[str, Tensor]:
        """Solve gate and up, then down, of a target layer; moves the states (the target's, if not refined)."""
        target, knobs = self.target, self.knobs
        if layer == target.layers - 1:
            self.mute = knobs.mute_last
        gates, ups = (
            {at: Moments.zeros(target.width, self.experts.spec(at[0]).mlp, self.device) for at in present} for _ in "gu"
        )
        for at, rows, time, units in self.experts.feed_forward(present):
            k, seen = at[0], self.normalised(rows, time)
            gated = as_gated(self.experts.spec(k).activation, *units)
            gate, up = (self.experts.paired(k, rows, x, time) for x in gated)
            weight, quiet = self.weight[k][rows, :time] * self.heard[:time], self._off(k, rows)[:, :time]
            share = self.texts.owned[k][rows, :time].to(up)[..., None]
            self._add(gates[at], seen, gate * share - knobs.off_gate * (1 - share), weight + quiet)
            self._add(ups[at], seen, up, weight)
            rest = self.normalised(rows)[:, time:].flatten(0, 1)
            weight = self._off(k, rows)[:, time:].to(rest).flatten()
            gates[at].add_gram(rest, weight)
            gates[at].cross -= knobs.off_gate * (weight @ rest).double()[:, None]
        filled = sum(self.experts.spec(k).mlp for k, _ in present)
        spare = self._random(target.width, 2 * max(0, target.mlp - filled)).chunk(2, dim=1)
        weights = {
            f"{role}.weight": torch.cat([*(f.solve(knobs.ridge).to(self.dtype) for f in fits.values()), extra], dim=1).T
            for role, fits, extra in (("gate", gates, spare[0]), ("up", ups, spare[1]))
        }
        self.heed = self._heed()
        writers = _writers.moments(self, lambda rows: self._hidden(weights, rows), len(weights["up.weight"]))
        keep = _writers.kept(self, writers, layer, "out", 1, target.mlp)
        weights = {role: w[keep].contiguous() for role, w in weights.items()}
        weights["down.weight"] = _writers.solved(self, writers, keep)
        if not self.refine.steps:
            self._advance(lambda rows: self._hidden(weights, rows), weights["down.weight"])
        return weights

    def head(self) -> dict[str, Tensor]:
        """Ridge from the final normed stream onto the owner's centred logits, then refined by KL (convex)."""
        moments = Moments.zeros(self.target.width, self.target.vocab, self.device)
        for rows in self.batches():
            weight = (self.texts.fit[rows, None] & self.texts.scored).to(self.dtype)
            goal = self.teacher(rows)
            self._add(moments, self.normalised(rows), goal - goal.mean(-1, keepdim=True), weight)
        head = moments.solve(self.knobs.ridge).T.to(self.dtype).contiguous()
        if self.refine.head_steps:
            with self.clock("refine"):
                head = _refine.head(self, head)
        return {"norm.weight": torch.ones(self.target.width, dtype=self.dtype), "head.weight": head}

    # ------------------------------------------------------------------------------------------ parts

    def batches(self) -> Iterator[Tensor]:
        """Row indices, a batch at a time."""
        yield from torch.arange(len(self.texts.tokens)).split(self.batch)

    def stream(self, make: Make) -> Tensor:
        """A state of all rows, at home, made batch by batch."""
        return torch.cat([make(rows).to(self.experts.home) for rows in self.batches()])

    def normalised(self, rows: Tensor, time: int | None = None) -> Tensor:
        """The target's normed stream: what its readers and its head see."""
        return decoder.rms(self.state[rows, :time].to(self.device), self.target.eps)

    def audible(self, *states: Tensor) -> tuple[Tensor, ...]:
        """Of (row, time, …), the positions that are still read: in the last layer only those that are scored."""
        return states if bool(self.heard.all()) else tuple(x[:, self.heard] for x in states)

    def goal(self, k: int, rows: Tensor, *, fitted: bool = True) -> tuple[Tensor, Tensor]:
        """What expert k's slice should hold now (row, time, slice), and the weight of each position.

        `fitted`: rows held out have no weight; else all have theirs, to measure by.
        """
        owned = self.texts.owned[k][rows].to(self.device)
        goal = self.experts.state(k, rows) @ self.encoders[k][:, self.slices[k]].to(self.device)
        quiet = self.mute * (1 - owned)
        if fitted:
            quiet = quiet * self.texts.fit[rows, None].to(owned)
        weight = (self.weight if fitted else self.say)[k][rows].to(owned)
        return goal * owned[..., None], weight + quiet

    def teacher(self, rows: Tensor) -> Tensor:
        """What the head should say (row, time, vocab): see `Experts.teacher`."""
        return self.experts.teacher(rows, self.target.vocab)

    def _heed(self) -> Tensor:
        """How much an error of the stream counts at each position (row, time), by the owner's states: `width.heed`."""
        found = torch.zeros_like(self.texts.owned[0], dtype=self.dtype)
        for k in self.texts.owner.unique().tolist():
            mine = torch.nonzero(self.texts.owner == k).flatten()
            power = torch.cat([self.experts.state(k, rows).pow(2).mean(-1).cpu() for rows in mine.split(self.batch)])
            found[mine[:, None], self.heard.nonzero().T] = width.heed(power[:, self.heard])
        return found

    def _off(self, k: int, rows: Tensor) -> Tensor:
        """Weight of a closed gate where expert k has no say (row, time)."""
        return self.knobs.off_weight * (1 - self.texts.owned[k][rows]) * self.texts.fit[rows, None] * self.heard

    def _pass(self, before: Tensor, weights: dict[str, Tensor]) -> None:
        """The target's states after a layer that reads `before`."""
        self.state = self.stream(lambda rows: decoder.layer(self.target, weights, before[rows].to(self.device)).out)

    def _mixed(self, spec: Spec, weights: dict[str, Tensor], rows: Tensor) -> Tensor:
        return decoder.attend(spec, *decoder.project_heads(spec, weights, self.normalised(rows)))

    def _hidden(self, weights: dict[str, Tensor], rows: Tensor) -> Tensor:
        return decoder.feed_forward(self.target, weights, self.normalised(rows))[2]

    def _advance(self, features: Make, writer: Tensor) -> None:
        self.state = self.stream(lambda rows: self.state[rows].to(self.device) + F.linear(features(rows), writer))

    def _placed(self, at: At, q: Tensor, key: Tensor, v: Tensor) -> Tensor:
        """An expert's heads as the target's: groups of one common ratio, rotary pairs where the target has them."""
        spec, place = self.experts.spec(at[0]), self.placements[at[0]][at[1]]
        q, key, v = (x.unflatten(-1, (-1, spec.head_size)) for x in (q, key, v))
        key, v = (expand_groups(x, spec.heads // spec.kv_heads, self.ratio) for x in (key, v))
        parts = (place.place(q, value=False), place.place(key, value=False), place.place(v, value=True))
        return torch.cat([x.flatten(-2) for x in parts], dim=-1)

    def _norms(self, weights: dict[str, Tensor], present: Present) -> dict[str, Tensor]:
        """For a target that normalises q and k per head: γ, and the maps so that γ turns no direction.

        γ² is the mean over heads: of the experts' own γ² where all normalise (one is kept exactly then), else of the
        typical power.
        """
        out: dict[str, Tensor] = {}
        size = self.target.head_size
        for role, ratio in (("q", self.ratio), ("k", 1)):
            batches = (decoder.linear(weights, role, self.normalised(rows)) for rows in self.batches())
            power = torch.stack([x.unflatten(-1, (-1, size)).pow(2).mean((0, 1, 3)) for x in batches]).mean(0)
            squares, first = power[:, None].repeat(1, size), 0
            for k, i in present if self.experts.normed else ():
                spec = self.experts.spec(k).at(i)
                heads = slice(first, first := first + spec.heads // self.ratio * ratio)
                gamma = self.placements[k][i].place(present[k, i][f"{role}_norm.weight"][None], value=False)
                squares[heads] = gamma.pow(2) * spec.head_size / size  # beside zeros a head is that much smaller
            gamma = squares.mean(0).sqrt()
            gamma = torch.where(gamma > 0, gamma, gamma.mean())
            turned = weights[f"{role}.weight"].unflatten(0, (-1, size)) * (gamma.mean() / gamma)[:, None]
            out |= {f"{role}.weight": turned.flatten(0, 1), f"{role}_norm.weight": gamma}
        return out

    def _with_one(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if self.bias else x

    def _named(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Solutions (in, out) as weights (out, in); the last input is the bias where the family has one."""
        width_ = self.target.width
        out = {f"{role}.weight": m[:width_].T.contiguous() for role, m in maps.items()}
        return out | {f"{role}.bias": m[width_].clone() for role, m in maps.items() if role in self.bias}

    def _random(self, inputs: int, outputs: int) -> Tensor:
        """Spare heads and neurons are random features of the stream: the writer's regression puts them to use."""
        drawn = torch.randn(inputs, outputs, generator=self.generator).to(self.device, self.dtype)
        return drawn.div(inputs**0.5)

    def _add(self, moments: Moments, x: Tensor, y: Tensor, weight: Tensor) -> None:
        moments.add(x.flatten(0, -2), y.flatten(0, -2), weight.to(x).flatten())


def as_gated(activation: str, gate: Tensor | None, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up values with which a SwiGLU unit computes the expert's unit.

    Exact for SiLU, gated or not. GELU(z) is silu(1.702 z) / 1.702 within 0.02 (Hendrycks & Gimpel 2016), ReLU(z) is
    silu(8 z) / 8 within 0.035.
    """
    slope = {"silu": 1.0, "swish": 1.0, "relu": 8.0}.get(activation, 1.702)
    if gate is None:
        return up * slope, torch.full_like(up, 1 / slope)
    return gate * slope, up / slope
