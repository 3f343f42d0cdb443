"""Wall and CPU seconds by stage, and the process's peak memory; children that have ended count as the process does."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """`with clock("fold"): …` adds to that stage; a stage inside another is taken out of the outer one."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[list[float]] = field(default_factory=list)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        self._inner.append([0.0, 0.0])
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            inner = self._inner.pop()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + wall - inner[0]
            self.cpu_seconds[stage] = self.cpu_seconds.get(stage, 0.0) + cpu - inner[1]
            if self._inner:
                self._inner[-1][0] += wall
                self._inner[-1][1] += cpu


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """Largest resident memory so far of this process; of RUSAGE_CHILDREN, of any child that has ended."""
    peak = resource.getrusage(who).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
