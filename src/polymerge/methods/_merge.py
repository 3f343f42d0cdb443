"""From aligned experts to weights: the part that all weight-averaging rivals share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polymerge.methods._lift import Lifted
from polymerge.methods._maps import LayerMaps, Stream, Weights, apply, as_it_is, average
from polymerge.model.spec import Spec

Emit = Callable[[int | None, dict[str, Tensor]], None]


@dataclass(frozen=True)
class Alignment:
    """One stream per expert, and for every target layer the maps of the experts that were aligned there."""

    streams: Sequence[Stream]
    layers: Sequence[Mapping[int, LayerMaps]]


def aligned(lifted: Sequence[Lifted], alignment: Alignment, target: Spec, host: int) -> dict[int, Weights]:
    """Weights of one target layer, by expert, in the target's axes."""
    out = {}
    for k, expert in enumerate(lifted):
        weights = expert.at(host)
        if weights is not None:
            maps = alignment.layers[host].get(k) or as_it_is(expert, target, weights)
            out[k] = apply(weights, alignment.streams[k], maps)
    return out


def embedding(lifted: Sequence[Lifted], alignment: Alignment, weights: Sequence[float]) -> Tensor:
    """Σ_k w_k E_k write_k (vocab, target resid)."""
    parts = []
    for w, expert, stream in zip(weights, lifted, alignment.streams, strict=True):
        table = expert.outer()["embed.weight"]
        parts.append(w * (table @ stream.write.to(table)))
    return torch.stack(parts).sum(0)


def final(
    lifted: Sequence[Lifted], alignment: Alignment, weights: Sequence[float], target: Spec, embed: Tensor
) -> Weights:
    """Final norm and head; a tied head is the embedding, and the norm makes up for its scale."""
    gammas, heads = [], []
    for w, expert, stream in zip(weights, lifted, alignment.streams, strict=True):
        outer = expert.outer()
        gain = torch.as_tensor(expert.tied_gain / stream.ratio if target.tied else 1.0)
        gammas.append(w * stream.gamma(outer["norm.weight"]) * gain.to(embed))
        heads.append(w * (outer["head.weight"] @ stream.read.to(outer["head.weight"])))
    head = embed if target.tied else torch.stack(heads).sum(0)
    return {"norm.weight": torch.stack(gammas).sum(0), "head.weight": head}


def emit_average(
    lifted: Sequence[Lifted],
    alignment: Alignment,
    weights: Sequence[float],
    target: Spec,
    emit: Emit,
    *,
    add: bool = False,
) -> None:
    """Average the aligned experts and emit the target's weights; `add`: the maps carry the shares (`_maps.average`)."""
    share = [1.0] * len(lifted) if add else list(weights)
    embed = embedding(lifted, alignment, share)
    emit(None, {"embed.weight": embed})
    for host in range(target.layers):
        parts = aligned(lifted, alignment, target, host)
        emit(host, average([(share[k], part) for k, part in parts.items()], target, embed, add=add))
    emit(None, final(lifted, alignment, weights, target, embed))
