"""Which target layer hosts each layer of an expert: a strictly increasing map."""

import math


def spread(layers: int, target_layers: int, rule: str = "ends") -> tuple[int, ...]:
    """The target layers of an expert's layers, in order; in the others it is the identity.

    "ends": the first on the first, the last on the last, the others evenly between. "centred": each in the middle of
    its share of the target's layers, as is a lone one by either rule. Which is better depends on the experts (LOG.md,
    2026-11-26). Raises ValueError if the expert is the deeper one.
    """
    if layers > target_layers:
        raise ValueError(f"{layers} expert layers do not fit into {target_layers} target layers")
    if rule == "centred" or layers == 1:
        return tuple((2 * i + 1) * target_layers // (2 * layers) for i in range(layers))
    return tuple(math.ceil(i * (target_layers - 1) / (layers - 1) - 0.5) for i in range(layers))
