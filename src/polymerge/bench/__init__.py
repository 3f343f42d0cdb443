"""The benchmark: the seed experiment's suite and text, every method side by side, rows that a resumed run goes on from.

from polymerge import bench
bench.run("modular", "quick", "out/bench")
bench.report("out/bench")
"""

from polymerge.bench.rows import Row, Store
from polymerge.bench.runner import report, run, workers
from polymerge.bench.suites import PROFILES, SUITES, left_out

__all__ = ["PROFILES", "SUITES", "Row", "Store", "left_out", "report", "run", "workers"]
