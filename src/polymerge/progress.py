"""Progress of long work: what the work reports to, and two listeners: nothing, and bars in a terminal."""

import sys
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


@runtime_checkable
class Progress(Protocol):
    """What a merge reports to."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a stage of `total` steps (None: unknown); the one before it has ended."""

    def advance(self, note: str = "", n: int = 1) -> None:
        """`n` more steps of the stage are done; `note` says what is being done."""


class Quiet:
    """Listens and says nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a stage."""

    def advance(self, note: str = "", n: int = 1) -> None:
        """Steps are done."""


class Bars:
    """A line for each stage on stderr: bar, steps, time left, and what is being done; a context manager."""

    def __init__(self, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[clock]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("[dim]{task.fields[note]}"),
            console=console or Console(stderr=True),
            speed_estimate_period=float("inf"),  # by rich's default, steps of half a minute give no estimate
        )
        self._task: "TaskID | None" = None

    def __enter__(self) -> "Bars":  # noqa: PYI034  beartype checks method by method: no Self
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end()
        self._bars.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a stage of `total` steps; its line stays when it is done."""
        self._end()
        self._task = self._bars.add_task(name, total=total, note="", clock="left")

    def advance(self, note: str = "", n: int = 1) -> None:
        """`n` more steps; an empty note leaves the last one."""
        if self._task is None:
            return
        task = self._bars.tasks[self._bars.task_ids.index(self._task)]
        done = task.completed + n
        total = task.total if task.total is None else max(task.total, done)  # a guess may be too small
        self._bars.update(self._task, completed=done, total=total, note=note or task.fields["note"])

    def _end(self) -> None:
        """The stage's line as finished, however many of its steps were needed."""
        if self._task is None:
            return
        done = max(1, int(self._bars.tasks[self._bars.task_ids.index(self._task)].completed))
        self._bars.update(self._task, total=done, completed=done, note="", clock="took")
        self._task = None


def choose(*, quiet: bool = False) -> AbstractContextManager[Progress]:
    """Bars where stderr is a terminal, otherwise nothing."""
    return nullcontext(Quiet()) if quiet or not sys.stderr.isatty() else Bars()
