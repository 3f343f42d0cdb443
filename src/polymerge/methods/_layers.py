"""The fold's engine: one target, layer by layer, in closed form and closed loop (see `fold.py` for the method).

States live on the CPU, whole: the target's (row, time, width) and every expert's (row, time, resid). Batches
of rows go to the device; one layer of each model is there at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from polymerge.align import depth, prune, width
from polymerge.align.heads import expand_groups, placement
from polymerge.calibrate.calibration import Calibration
from polymerge.calibrate.moments import Moments
from polymerge.clock import Clock
from polymerge.methods import _judge, _refine
from polymerge.model import decoder
from polymerge.model.source import Source
from polymerge.model.spec import Spec

Emit = Callable[[int | None, dict[str, Tensor]], None]
Features = Callable[[Tensor], Tensor]
Present = Mapping[tuple[int, int], dict[str, Tensor]]
"""(expert, its layer) -> weights: what a target layer hosts, in order."""


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
        self.experts, self.target, self.texts, self.bases, self.knobs = experts, target, texts, bases, knobs
        self.refine, self.bias, self.batch, self.progress = refine, bias, batch, progress
        self.device, self.dtype = experts[0].device, experts[0].dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.hosts = [depth.spread(e.spec.layers, target.layers, knobs.hosts) for e in experts]
        self.placements = [placement(e.spec, target) for e in experts]
        self.ratio = target.heads // target.kv_heads
        self.constant = any(e.spec.has_constants for e in experts)
        self.balance = tuple(balance) if balance is not None else (1.0,) * len(experts)
        self.scales = [b.scale / max(other.scale for other in bases) for b in bases]
        self.encoders, self.slices = width.encoders(
            bases, self.scales, self.balance, target.width, self.dtype, first=int(self.constant), even=knobs.even
        )
        self.outers = [e.outer() for e in experts]
        self.mute = knobs.mute
        self.state = self.weight = torch.empty(0)
        self.current: list[Tensor] = []
        self.inside: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # an expert's layer: before, after its attention
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

    def layer(self, index: int) -> dict[str, Tensor]:
        """One target layer: attention, MLP, then both refined together."""
        present = {
            (k, i): self.experts[k].layer(i)
            for k, hosts in enumerate(self.hosts) for i, host in enumerate(hosts) if host == index
        }  # fmt: skip
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
        self.current = []
        for k, (expert, outer) in enumerate(zip(self.experts, self.outers, strict=True)):
            self.current.append(self.stream(partial(self._embedded, k, outer)))
            foreign = texts.reading(k)
            vectors = outer["embed.weight"][: target.vocab] if foreign is None else outer["embed.weight"]
            if "positions.weight" in outer:
                vectors = vectors + outer["positions.weight"][: texts.tokens.shape[1]].mean(0)
            if foreign is not None:
                mine = torch.nonzero((texts.owner == k) & texts.fit).flatten()
                vectors = foreign[1].embeddings(vectors, foreign[0].of(mine), texts.tokens[mine])
            table += known[k][:, None] * width.centred(expert, vectors).cpu() @ self.encoders[k]
        if self.constant:
            table[:, 0] = table[texts.tokens[texts.fit]].pow(2).mean().sqrt()
        self.state = F.embedding(texts.tokens, table)
        return table

    def attention(self, layer: int, present: Present) -> dict[str, Tensor]:
        """Solve q, k, v, then o, of a target layer; moves all states past the attention.

        Where it hosts several layers of an expert, all their heads read what the first of them reads.
        """
        target, size, ratio = self.target, self.target.head_size, self.ratio
        groups = {at: self.experts[at[0]].spec.heads // ratio for at in present}
        inputs = target.width + bool(self.bias)
        fits = {at: Moments.zeros(inputs, groups[at] * (ratio + 2) * size, self.device) for at in present}
        states, self.inside = list(self.current), {}
        for (k, i), weights in present.items():
            expert, start, mid = self.experts[k], states[k], states[k].clone()
            for rows, time in self.reached(k):
                own = self._own_time(k, rows, time)
                x = start[rows, :own].to(self.device)
                n = decoder.normalise(expert.spec, x, weights["norm1.weight"], weights.get("norm1.bias"))
                q, key, v = decoder.project_heads(expert.spec, weights, n)
                written = decoder.linear(weights, "o", decoder.attend(expert.spec, q, key, v))
                mid[rows, :own] = width.centred(expert, x + written).cpu()
                seen = self._with_one(self.normalised(rows, time))
                values = self._paired(k, rows, self._placed(k, q, key, v), time)
                self._add(fits[k, i], seen, values, self.weight[k][rows, :time])
            self.inside[k, i] = start, mid
            if (k, i + 1) in present:
                states[k] = self._past_mlp(k, i, weights)
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
        for k in {k for k, _ in present}:
            self.current[k] = self._attended(k)
        wide = replace(target, heads=total * ratio, kv_heads=total)
        if "qk_norm" in target.features:
            weights |= self._temperatures(weights)
        writers = self.writers(lambda rows: self._mixed(wide, weights, rows), total * ratio * size)
        keep = self.keep(writers, layer, "mid", ratio * size, target.kv_heads)
        for role, per in (("q", ratio * size), ("k", size), ("v", size)):
            for name in (f"{role}.weight", f"{role}.bias"):
                if name in weights:
                    weights[name] = weights[name][members(keep, per)].contiguous()
        weights["o.weight"] = self.write(writers, members(keep, ratio * size))
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
            {at: Moments.zeros(target.width, self.experts[at[0]].spec.mlp, self.device) for at in present} for _ in "gu"
        )
        for (k, i), weights in present.items():
            expert, out = self.experts[k], self.inside[k, i][1].clone()
            for rows, time in self.reached(k):
                own = self._own_time(k, rows, time)
                gate, up, out[rows, :own] = self._fed(k, i, weights, rows, own)
                gate, up = (self._paired(k, rows, x, time) for x in as_gated(expert.spec.activation, gate, up))
                seen, owned = self.normalised(rows, time), self.texts.owned[k][rows, :time]
                weight, quiet = self.weight[k][rows, :time], self._off(k, rows)[:, :time]
                share = owned.to(up)[..., None]
                self._add(gates[k, i], seen, gate * share - knobs.off_gate * (1 - share), weight + quiet)
                self._add(ups[k, i], seen, up, weight)
                rest = self.normalised(rows)[:, time:].flatten(0, 1)
                weight = self._off(k, rows)[:, time:].to(rest).flatten()
                gates[k, i].add_gram(rest, weight)
                gates[k, i].cross -= knobs.off_gate * (weight @ rest).double()[:, None]
            self.current[k] = out  # of the expert's last layer here, in the end
        self.inside = {}
        units = sum(self.experts[k].spec.mlp for k, _ in present)
        spare = self._random(target.width, 2 * max(0, target.mlp - units)).chunk(2, dim=1)
        weights = {
            f"{role}.weight": torch.cat([*(f.solve(knobs.ridge).to(self.dtype) for f in fits.values()), extra], dim=1).T
            for role, fits, extra in (("gate", gates, spare[0]), ("up", ups, spare[1]))
        }
        writers = self.writers(lambda rows: self._hidden(weights, rows), len(weights["up.weight"]))
        keep = self.keep(writers, layer, "out", 1, target.mlp)
        weights = {role: w[keep].contiguous() for role, w in weights.items()}
        weights["down.weight"] = self.write(writers, keep)
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

    # ------------------------------------------------------------------------------------------ writers

    def goal(self, k: int, rows: Tensor, *, fitted: bool = True) -> tuple[Tensor, Tensor]:
        """What expert k's slice should hold now (row, time, slice), and the weight of each position.

        `fitted`: rows held out have no weight; else all have theirs, to measure by.
        """
        owned = self.texts.owned[k][rows].to(self.device)
        state = self._paired(k, rows, self.current[k][rows].to(self.device), self.texts.tokens.shape[1])
        goal = state @ self.encoders[k][:, self.slices[k]].to(self.device)
        quiet = self.mute * (1 - owned)
        if fitted:
            quiet = quiet * self.texts.fit[rows, None].to(owned)
        weight = (self.weight if fitted else self.say)[k][rows].to(owned)
        return goal * owned[..., None], weight + quiet

    def writers(self, features: Features, inputs: int) -> list[Moments]:
        """Per expert: moments from hidden features onto what its slice still lacks.

        Nearly all positions of a row have one weight for an expert: 1 in its own rows, μ in others'. So one Gram
        matrix for each owner serves all slices, and only positions that differ (shared beginnings) are counted apart.
        """
        out = [Moments.zeros(inputs, s.stop - s.start, self.device) for s in self.slices]
        shared = torch.zeros(len(self.experts), inputs, inputs, dtype=torch.float64, device=self.device)
        for rows in self.batches():
            x, state, owner = features(rows), self.state[rows].to(self.device), self.texts.owner[rows]
            fit = self.texts.fit[rows]
            for j in owner[fit].unique().tolist():
                mine = x[fit & (owner == j)].flatten(0, 1)
                shared[j] += (mine.T @ mine).double()
            for k, part in enumerate(self.slices):
                goal, weight = self.goal(k, rows)
                out[k].add_cross(x.flatten(0, 1), (goal - state[..., part]).flatten(0, 1), weight.flatten())
                usual = torch.where(owner == k, 1.0, self.mute).to(weight)[:, None] * fit[:, None].to(weight)
                out[k].add_gram(x.flatten(0, 1), (weight - usual).flatten())
        for k, moments in enumerate(out):
            for j, gram in enumerate(shared):
                moments.gram += gram * (1.0 if j == k else self.mute)
        return out

    def keep(self, writers: list[Moments], layer: int, where: str, group: int, keep: int) -> Tensor:
        """Which groups of inputs stay: the cheapest to lose in KL go first, whoever they belong to."""
        groups = len(writers[0].gram) // group
        if groups <= keep:
            return torch.arange(groups)
        shares = [
            prune.Writer(
                m.damped(self.knobs.ridge) / max(m.weight, 1e-30),
                m.solve(self.knobs.ridge) @ root(self.balance[k] * self._metric(k, layer, where)),
            )
            for k, m in enumerate(writers)
        ]
        return prune.keep_groups(shares, group, keep)

    def write(self, writers: list[Moments], inputs: Tensor) -> Tensor:
        """The writer's weight (resid, in), each expert's slice by its own regression."""
        out = torch.zeros(self.target.width, len(inputs), dtype=self.dtype, device=self.device)
        for moments, part in zip(writers, self.slices, strict=True):
            out[part] = moments.solve(self.knobs.ridge, inputs.to(self.device)).T.to(self.dtype)
        return out

    def _metric(self, k: int, layer: int, where: str) -> Tensor:
        """Fisher matrix of expert k's slice where its state now stands."""
        reached = sum(host <= layer for host in self.hosts[k])
        last = max(reached - 1, 0)
        at_mid = reached == 0 or (where == "mid" and self.hosts[k][last] == layer)
        fisher = (self.bases[k].fisher_mid if at_mid else self.bases[k].fisher_out)[last]
        size = self.slices[k].stop - self.slices[k].start
        told = self.bases[k].directions[:, :size].to(fisher) * self.scales[k]
        metric: Tensor = told.T @ fisher @ told
        return metric

    # ------------------------------------------------------------------------------------------ parts

    def batches(self) -> Iterator[Tensor]:
        """Row indices, a batch at a time."""
        yield from torch.arange(len(self.texts.tokens)).split(self.batch)

    def stream(self, make: Features) -> Tensor:
        """A state of all rows, on the CPU, made batch by batch."""
        return torch.cat([make(rows).cpu() for rows in self.batches()])

    def reached(self, k: int) -> Iterator[tuple[Tensor, int]]:
        """Batches of rows, and up to where expert k has a say in them: all of its own, the beginning of others'."""
        mine = self.texts.owner == k
        says = (self.texts.owned[k][~mine] > 0).any(0).nonzero().flatten()
        time = self.texts.tokens.shape[1]
        for rows in torch.nonzero(mine).flatten().split(self.batch):
            yield rows, time
        if len(says):
            for rows in torch.nonzero(~mine).flatten().split(self.batch):
                yield rows, int(says[-1]) + 1

    def normalised(self, rows: Tensor, time: int | None = None) -> Tensor:
        """The target's normed stream: what its readers and its head see."""
        return decoder.rms(self.state[rows, :time].to(self.device), self.target.eps)

    def teacher(self, rows: Tensor) -> Tensor:
        """Logits of each row's owner (row, time, vocab), from the experts' present (final) states.

        An owner with another tokenizer: log-probabilities of the result's tokens.
        """
        owners = self.texts.owner[rows]
        shape = (*self.texts.tokens[rows].shape, self.target.vocab)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for k in owners.unique().tolist():
            mine = rows[owners == k]
            found = decoder.logits(self.experts[k].spec, self.outers[k], self.current[k][mine].to(self.device))
            if (foreign := self.texts.reading(k)) is not None:
                reading, translator = foreign
                found = translator.project(found.log_softmax(-1), reading.of(mine), self.texts.tokens[mine])
            out[owners == k] = found[..., : self.target.vocab].to(out)
        return out

    def _attended(self, k: int) -> Tensor:
        """Expert k's state (row, time, resid) with all that its attention in this target layer writes, and no MLP."""
        (_, out), *more = [pair for (j, _), pair in self.inside.items() if j == k]
        for start, mid in more:
            out = out + mid - start
        return out

    def _past_mlp(self, k: int, i: int, weights: dict[str, Tensor]) -> Tensor:
        """Expert k's state after its layer i."""
        out = self.inside[k, i][1].clone()
        for rows, time in self.reached(k):
            own = self._own_time(k, rows, time)
            out[rows, :own] = self._fed(k, i, weights, rows, own)[2]
        return out

    def _fed(
        self, k: int, i: int, weights: dict[str, Tensor], rows: Tensor, own: int
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gate and up of expert k's MLP i, and its state behind it, on the CPU; over its first `own` tokens of rows."""
        expert, (start, mid) = self.experts[k], self.inside[k, i]
        x = mid[rows, :own].to(self.device)
        read = start[rows, :own].to(self.device) if expert.spec.parallel else x
        n = decoder.normalise(expert.spec, read, weights["norm2.weight"], weights.get("norm2.bias"))
        gate, up, hidden = decoder.feed_forward(expert.spec, weights, n)
        return gate, up, width.centred(expert, x + decoder.linear(weights, "down", hidden)).cpu()

    def _own_time(self, k: int, rows: Tensor, time: int) -> int:
        """How many of its own tokens expert k reads in the first `time` positions of these rows."""
        foreign = self.texts.reading(k)
        return time if foreign is None else max(1, int(foreign[0].last[rows, :time].max()) + 1)

    def _paired(self, k: int, rows: Tensor, values: Tensor, time: int) -> Tensor:
        """Expert k's values, over its own tokens, at the first `time` positions of the rows."""
        foreign = self.texts.reading(k)
        return values if foreign is None else foreign[0].of(rows).paired(values, time)

    def _off(self, k: int, rows: Tensor) -> Tensor:
        """Weight of a closed gate where expert k has no say (row, time)."""
        return self.knobs.off_weight * (1 - self.texts.owned[k][rows]) * self.texts.fit[rows, None]

    def _embedded(self, k: int, outer: dict[str, Tensor], rows: Tensor) -> Tensor:
        foreign, expert = self.texts.reading(k), self.experts[k]
        tokens = (self.texts.tokens if foreign is None else foreign[0].tokens)[rows].to(self.device)
        return width.centred(expert, decoder.embed(expert.spec, outer, tokens))

    def _pass(self, before: Tensor, weights: dict[str, Tensor]) -> None:
        """The target's states after a layer that reads `before`."""
        self.state = self.stream(lambda rows: decoder.layer(self.target, weights, before[rows].to(self.device)).out)

    def _mixed(self, spec: Spec, weights: dict[str, Tensor], rows: Tensor) -> Tensor:
        return decoder.attend(spec, *decoder.project_heads(spec, weights, self.normalised(rows)))

    def _hidden(self, weights: dict[str, Tensor], rows: Tensor) -> Tensor:
        return decoder.feed_forward(self.target, weights, self.normalised(rows))[2]

    def _advance(self, features: Features, writer: Tensor) -> None:
        self.state = self.stream(lambda rows: self.state[rows].to(self.device) + F.linear(features(rows), writer))

    def _placed(self, k: int, q: Tensor, key: Tensor, v: Tensor) -> Tensor:
        """An expert's heads as the target's: groups of one common ratio, rotary pairs where the target has them."""
        spec, place = self.experts[k].spec, self.placements[k]
        q, key, v = (x.unflatten(-1, (-1, spec.head_size)) for x in (q, key, v))
        key, v = (expand_groups(x, spec.heads // spec.kv_heads, self.ratio) for x in (key, v))
        parts = (place.place(q, value=False), place.place(key, value=False), place.place(v, value=True))
        return torch.cat([x.flatten(-2) for x in parts], dim=-1)

    def _temperatures(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A target that normalises q and k per head gets their typical size back as the norms' weights."""
        sizes = {}
        for role in "qk":
            power = [decoder.linear(weights, role, self.normalised(rows)).pow(2).mean() for rows in self.batches()]
            sizes[f"{role}_norm.weight"] = torch.stack(power).mean().sqrt().repeat(self.target.head_size)
        return sizes

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


def members(groups: Tensor, size: int) -> Tensor:
    """Indices of the members of groups of `size` consecutive entries."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def root(metric: Tensor) -> Tensor:
    """A square root of a positive semi-definite matrix, slightly lifted so that no direction is free."""
    eye = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    power, vectors = torch.linalg.eigh(metric + 1e-3 * metric.diagonal().mean() * eye)
    scaled: Tensor = vectors * power.clamp_min(0).sqrt()
    return scaled


def as_gated(activation: str, gate: Tensor | None, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up values with which a SwiGLU unit computes the expert's unit.

    Exact for SiLU, gated or not. GELU(z) is silu(1.702 z) / 1.702 within 0.02 (Hendrycks & Gimpel 2016), ReLU(z) is
    silu(8 z) / 8 within 0.035.
    """
    slope = {"silu": 1.0, "swish": 1.0, "relu": 8.0}.get(activation, 1.702)
    if gate is None:
        return up * slope, torch.full_like(up, 1 / slope)
    return gate * slope, up / slope
