"""Which target layer hosts each layer of an expert: a strictly increasing map."""

import math


def spread(layers: int, target_layers: int) -> tuple[int, ...]:
    """The first layer on the first, the last on the last, the others evenly between; elsewhere the expert is identity.

    A lone layer goes to the middle. Measured against other maps (LOG.md, 2026-11-25). Raises ValueError if the expert
    is the deeper one.
    """
    if layers > target_layers:
        raise ValueError(f"{layers} expert layers do not fit into {target_layers} target layers")
    if layers == 1:
        return (target_layers // 2,)
    return tuple(math.ceil(i * (target_layers - 1) / (layers - 1) - 0.5) for i in range(layers))
