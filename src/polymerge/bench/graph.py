"""Training on a GPU at its speed: an update as one CUDA graph, and products in TF32.

The hundreds of kernels of a small model take longer to launch than to run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def captured(work: Callable[[], T], device: str, optimiser: torch.optim.Optimizer | None = None) -> Callable[[], T]:
    """The work as one CUDA graph; on a CPU the work itself. What it returns is overwritten by the next call.

    It must read and write the same memory each time. It is tried three times first: an optimiser's updates are then
    of rate zero (set a rate after it), and what it remembers of them is forgotten.
    """
    if not device.startswith("cuda"):
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        if optimiser:
            set_rate(optimiser, 0.0)
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    for state in optimiser.state.values() if optimiser else ():
        for value in state.values():
            value.zero_()

    def again() -> T:
        graph.replay()
        return out

    return again


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; one that is a tensor, which a graph reads anew each time, in place."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def tensor_float() -> Iterator[None]:
    """Products of float32 matrices on a GPU in TF32, several times as fast, as training from scratch bears well."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
