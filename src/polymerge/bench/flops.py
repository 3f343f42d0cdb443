"""Counting the floating point operations of matrix products while code runs, whatever the code is.

    with Products() as products:
        fold()
    products.flops

An (m, k) by (k, n) product is 2·m·k·n operations. Counted are the products that torch is asked for, forwards and
backwards; attention's fused kernel, factorisations and element-wise work are not, as in `rows.training_flops`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polymerge.progress import Quiet

_FIRST: Mapping[Any, int] = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}
"""Products, and which argument their left factor is."""


class Products(TorchDispatchMode):
    """Counts while it is entered; costs a few microseconds for each operation of torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count it if it is a product."""
        at = _FIRST.get(func)
        if at is not None:
            self.flops += 2 * math.prod(args[at].shape) * args[at + 1].shape[-1]
        return func(*args, **(kwargs or {}))


class Until(Quiet):
    """A listener that notes the count when a stage begins for the first time: what follows is not counted."""

    def __init__(self, stage: str, products: Products) -> None:
        self.name, self.products = stage, products
        self.flops: int | None = None

    def stage(self, name: str, total: int | None = None) -> None:  # noqa: ARG002  as `Quiet`
        """Begin a stage."""
        if name == self.name and self.flops is None:
            self.flops = self.products.flops
