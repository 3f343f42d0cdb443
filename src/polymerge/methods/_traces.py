"""What goes into and comes out of every linear map of a decoder, layer by layer."""

from collections.abc import Callable, Iterator

from torch import Tensor

from polymerge.methods._maps import Weights
from polymerge.model import decoder
from polymerge.model.spec import Spec

INPUTS = {"q": "norm1", "k": "norm1", "v": "norm1", "o": "mixed", "gate": "norm2", "up": "norm2", "down": "hidden"}
"""The maps of a layer, and what each reads."""


def activations(
    spec: Spec, outer: Weights, layer: Callable[[int], Weights], tokens: Tensor
) -> Iterator[dict[str, Tensor]]:
    """First the embedding, then each layer's maps and inputs, then what the head reads, as `norm`."""
    x = decoder.embed(spec, outer, tokens)
    yield {"embed": x}
    for index in range(spec.layers):
        w, own = layer(index), spec.at(index)
        norm1 = decoder.read(own, w, "norm1", x)
        trace = decoder.layer(own, w, x)
        norm2 = decoder.read(own, w, "norm2", x if spec.parallel else trace.mid)
        seen = {"norm1": norm1, "mixed": trace.mixed, "norm2": norm2, "hidden": trace.hidden}
        maps = {role: decoder.linear(w, role, seen[feed]) for role, feed in INPUTS.items() if f"{role}.weight" in w}
        yield seen | maps
        x = trace.out
    yield {"norm": decoder.read(spec, outer, "norm", x)}
