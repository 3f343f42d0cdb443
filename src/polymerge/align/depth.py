"""Which target layer hosts each layer of an expert: a strictly increasing map."""


def uniform(layers: int, target_layers: int) -> tuple[int, ...]:
    """Spread `layers` expert layers evenly over `target_layers`; elsewhere the expert is the identity."""
    if layers > target_layers:
        raise ValueError(f"{layers} expert layers do not fit into {target_layers} target layers")
    return tuple(int((i + 0.5) * target_layers / layers) for i in range(layers))
