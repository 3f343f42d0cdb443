"""Which target layer hosts each layer of an expert: a map that never goes back."""

import math


def spread(layers: int, target_layers: int, rule: str = "ends") -> tuple[int, ...]:
    """The target layers of an expert's layers, in order; in those left out the expert is the identity.

    "ends": the first on the first, the last on the last, the others evenly between. "centred": each in the middle of
    its share of the target's layers, as is a lone one by either rule. Which is better depends on the experts (LOG.md,
    2026-11-26). An expert of more layers than the target shares them out evenly, by either rule: neighbours in one.
    """
    if rule == "centred" or layers == 1 or layers > target_layers:
        return tuple((2 * i + 1) * target_layers // (2 * layers) for i in range(layers))
    return tuple(math.ceil(i * (target_layers - 1) / (layers - 1) - 0.5) for i in range(layers))


def most(layers: int, target_layers: int) -> int:
    """The most layers of an expert that one target layer hosts."""
    hosts = spread(layers, target_layers)
    return max(hosts.count(host) for host in hosts)
