"""How many CPU threads suit a model."""

from collections.abc import Iterator
from contextlib import contextmanager

SMALL = 512
"""Residual width up to which the products of a layer are too small to be shared out: threads then only wait."""


@contextmanager
def fitting(width: int) -> Iterator[None]:
    """One thread inside for small models, as many as torch has been given for others.

    So a small merge gives the same bytes whatever the number of cores.
    """
    import torch

    before = torch.get_num_threads()
    if width <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
