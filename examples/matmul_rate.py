"""How much of a fold's time is matrix products at the speed of this machine: shipped pair, 1.5x, one thread.

    python examples/matmul_rate.py

Prints the operations of all products, CPU seconds by stage, and the share of the rate that a 1,024 by 1,024 product
reaches in the same run. Attention's fused kernel, factorisations and element-wise work are time without operations.
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from pair import Pair

from polymerge import threads
from polymerge.bench.flops import Products

SIZE, TIMES = 1024, 40


def main() -> None:
    """Fold, counting as it goes: a few microseconds an operation, under a second in all."""
    with tempfile.TemporaryDirectory() as scratch, threads.fitting(1):
        pair, before = Pair(Path(scratch), seed=0), rate()
        with Products() as products:
            seconds = pair.fold("1.5x").facts["fold_cpu_seconds"]
        machine = (before + rate()) / 2
    total = sum(seconds.values())
    print(json.dumps({
        "gigaflop": products.flops / 1e9, "cpu_seconds": seconds, "gigaflop_per_second": products.flops / total / 1e9,
        "machine": machine / 1e9, "share": products.flops / total / machine,
    }, indent=1))  # fmt: skip


def rate() -> float:
    """Operations a CPU second of a large float32 product."""
    a = torch.randn(SIZE, SIZE)
    began = time.process_time()
    for _ in range(TIMES):
        a @ a
    return 2 * SIZE**3 * TIMES / (time.process_time() - began)


if __name__ == "__main__":
    main()
