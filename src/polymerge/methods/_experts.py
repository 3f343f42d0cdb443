"""The experts of a fold on its calibration rows: the state of each, moved through what one target layer hosts of it.

States are kept whole, each in its expert's own tokens: (row, own time, resid), on the device where there is plenty of
room, else on the CPU. Batches of rows go to the device; only the layers that one target layer hosts are there at once.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from polymerge.align import depth, width
from polymerge.calibrate.calibration import Calibration
from polymerge.model import decoder
from polymerge.model.source import Source
from polymerge.model.spec import Spec

At = tuple[int, int]
"""(expert, its layer)."""
Present = Mapping[At, dict[str, Tensor]]
"""The weights of what a target layer hosts, in order."""


class Experts:
    """`hosts[k][i]`: the layer of the target that hosts expert k's layer i."""

    def __init__(
        self, sources: Sequence[Source], target: Spec, texts: Calibration, hosts: Sequence[tuple[int, ...]], batch: int
    ) -> None:
        self.sources, self.texts, self.hosts, self.batch = sources, texts, hosts, batch
        self.device, self.dtype = sources[0].device, sources[0].dtype
        self.normed = all("qk_norm" in spec.features for spec in (target, *(s.spec for s in sources)))
        numbers = texts.tokens.numel() * kept([s.spec for s in sources], target)
        self.home = home(torch.device(self.device), numbers * self.dtype.itemsize)
        self.outers = [source.outer() for source in sources]
        self.states = [self._embedded(k) for k in range(len(sources))]
        self._inside: dict[At, tuple[Tensor, Tensor]] = {}  # a layer's states: before and after its attention

    def __len__(self) -> int:
        """How many."""
        return len(self.sources)

    def spec(self, k: int) -> Spec:
        """What expert k computes."""
        return self.sources[k].spec

    def hosted(self, layer: int) -> Present:
        """What a target layer hosts, loaded now."""
        return {
            (k, i): self.sources[k].layer(i)
            for k, hosts in enumerate(self.hosts) for i, host in enumerate(hosts) if host == layer
        }  # fmt: skip

    def attention(self, present: Present) -> Iterator[tuple[At, Tensor, int, tuple[Tensor, Tensor, Tensor]]]:
        """Queries, keys and values of each, batch by batch: (at, rows, up to which position, theirs); moves all states.

        Where all experts normalise queries and keys, and the target does so itself, they are not normalised yet.
        Where several layers of an expert are hosted, its state then has what all their attention writes, and no MLP.
        """
        self._inside, states = {}, list(self.states)
        for (k, i), weights in present.items():
            source, spec, start, mid = self.sources[k], self.spec(k).at(i), states[k], states[k].clone()
            for rows, time in self.reached(k):
                own = self._own_time(k, rows, time)
                x = start[rows, :own].to(self.device)
                n = decoder.read(spec, weights, "norm1", x)
                q, key, v = decoder.project_heads(spec, weights, n)
                written = decoder.written(spec, weights, "o", decoder.attend(spec, q, key, v))
                mid[rows, :own] = width.centred(source, x + written).to(self.home)
                if self.normed:
                    q, key = (_before_norm(spec, weights, role, n) for role in "qk")
                yield (k, i), rows, time, (q, key, v)
            self._inside[k, i] = start, mid
            if (k, i + 1) in present:
                states[k] = mid.clone()
                for rows, time in self.reached(k):
                    own = self._own_time(k, rows, time)
                    states[k][rows, :own] = self._fed((k, i), weights, rows, own)[2]
        for k in {k for k, _ in present}:
            (_, out), *more = [pair for (j, _), pair in self._inside.items() if j == k]
            self.states[k] = sum((mid - start for start, mid in more), start=out)

    def feed_forward(self, present: Present) -> Iterator[tuple[At, Tensor, int, tuple[Tensor | None, Tensor]]]:
        """Gate and up of each, as `attention`; moves all states behind the last layer that is hosted."""
        for (k, i), weights in present.items():
            out = self._inside[k, i][1].clone()
            for rows, time in self.reached(k):
                own = self._own_time(k, rows, time)
                gate, up, out[rows, :own] = self._fed((k, i), weights, rows, own)
                yield (k, i), rows, time, (gate, up)
            self.states[k] = out
        self._inside = {}

    def state(self, k: int, rows: Tensor) -> Tensor:
        """Expert k's state at every position of the rows, on the device (row, time, resid)."""
        return self.paired(k, rows, self.states[k][rows].to(self.device), self.texts.tokens.shape[1])

    def paired(self, k: int, rows: Tensor, values: Tensor, time: int) -> Tensor:
        """Expert k's values, over its own tokens, at the first `time` positions of the rows."""
        foreign = self.texts.reading(k)
        return values if foreign is None else foreign[0].of(rows).paired(values, time)

    def reached(self, k: int) -> Iterator[tuple[Tensor, int]]:
        """Batches of rows, and up to where expert k has a say in them: all of its own, the beginning of others'.

        Of others' at least the first position, so that what it does there (nothing) is asked for at all.
        """
        mine = self.texts.owner == k
        says = (self.texts.owned[k][~mine] > 0).any(0).nonzero().flatten()
        time = self.texts.tokens.shape[1]
        for rows in torch.nonzero(mine).flatten().split(self.batch):
            yield rows, time
        until = int(says[-1]) + 1 if len(says) else 1
        if not bool(mine.all()):
            for rows in torch.nonzero(~mine).flatten().split(self.batch):
                yield rows, until

    def teacher(self, rows: Tensor, vocab: int) -> Tensor:
        """Logits of each row's owner (row, time, vocab), from the present (final) states.

        An owner with another tokenizer: log-probabilities of the result's tokens.
        """
        owners = self.texts.owner[rows]
        out = torch.empty(*self.texts.tokens[rows].shape, vocab, dtype=self.dtype, device=self.device)
        for k in owners.unique().tolist():
            mine = rows[owners == k]
            found = decoder.logits(self.spec(k), self.outers[k], self.states[k][mine].to(self.device))
            if (foreign := self.texts.reading(k)) is not None:
                reading, translator = foreign
                found = translator.project(found.log_softmax(-1), reading.of(mine), self.texts.tokens[mine])
            out[owners == k] = found[..., :vocab].to(out)
        return out

    def vectors(self, k: int, vocab: int) -> Tensor:
        """Expert k's embedding of the result's tokens (vocab, resid), with the mean of its learned positions."""
        texts, outer, foreign = self.texts, self.outers[k], self.texts.reading(k)
        found = outer["embed.weight"][:vocab] if foreign is None else outer["embed.weight"]
        if "positions.weight" in outer:
            found = found + outer["positions.weight"][: texts.tokens.shape[1]].mean(0)
        if foreign is not None:
            mine = torch.nonzero((texts.owner == k) & texts.fit).flatten()
            found = foreign[1].embeddings(found, foreign[0].of(mine), texts.tokens[mine])
        return width.centred(self.sources[k], found).cpu()

    def _embedded(self, k: int) -> Tensor:
        foreign, source = self.texts.reading(k), self.sources[k]
        tokens = self.texts.tokens if foreign is None else foreign[0].tokens
        with torch.no_grad():
            return torch.cat([
                width.centred(source, decoder.embed(source.spec, self.outers[k], some.to(self.device))).to(self.home)
                for some in tokens.split(self.batch)
            ])  # fmt: skip

    def _fed(self, at: At, weights: dict[str, Tensor], rows: Tensor, own: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gate and up of an MLP, and the state behind it, at home; over the first `own` tokens of the rows."""
        source, spec, (start, mid) = self.sources[at[0]], self.spec(at[0]).at(at[1]), self._inside[at]
        x = mid[rows, :own].to(self.device)
        n = decoder.read(spec, weights, "norm2", start[rows, :own].to(self.device) if spec.parallel else x)
        gate, up, hidden = decoder.feed_forward(spec, weights, n)
        out = width.centred(source, x + decoder.written(spec, weights, "down", hidden))
        return gate, up, out.to(self.home)

    def _own_time(self, k: int, rows: Tensor, time: int) -> int:
        """How many of its own tokens expert k reads in the first `time` positions of these rows."""
        foreign = self.texts.reading(k)
        return time if foreign is None else max(1, int(foreign[0].last[rows, :time].max()) + 1)


def _before_norm(spec: Spec, weights: Mapping[str, Tensor], role: str, n: Tensor) -> Tensor:
    """Queries or keys times γ, not divided by each head's size: linear in what is read, as a target's are."""
    heads = decoder.linear(weights, role, n).unflatten(-1, (-1, spec.head_size))
    scaled: Tensor = heads * weights[f"{role}_norm.weight"]
    return scaled.flatten(-2)


def kept(experts: Sequence[Spec], target: Spec) -> int:
    """Numbers that a fold keeps of each token: the target's states, and an expert's around each layer of one host."""
    states = ((2 * depth.most(e.layers, target.layers) + 1) * e.width for e in experts)
    return 3 * target.width + sum(states)


def home(device: torch.device, size: int) -> torch.device:
    """Where states of so many bytes are kept: on a GPU if they take less than a quarter of what is free there."""
    roomy = device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] // 4
    return device if roomy else torch.device("cpu")
