"""How the command line ends: our errors in one line, interruptions with what is left, JSON on its own."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from polymerge.errors import PolymergeError

NOTHING = "nothing was written"


class Commands(TyperGroup):
    """Commands in the order of definition; errors that are ours end in one line, others in a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:
            if not _stdout_is_lost():
                raise
            typer.echo(f"error: stdout: not written: {error.strerror}; send it elsewhere", err=True)
            sys.exit(2)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PolymergeError as error:
            tell(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _say_interrupted(NOTHING)


def tell(error: PolymergeError) -> None:
    """An error of ours in one line."""
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)


def _stdout_is_lost() -> bool:
    """Whether not even a line can be written (a full disk); then Python shall not try again at its end."""
    try:
        typer.echo()
    except OSError:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  to the end of the process
        return True
    return False


def _say_interrupted(left: str) -> NoReturn:
    typer.echo(f"interrupted; {left}", err=True)
    raise typer.Exit(130) from None


@contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C says what it leaves behind, as it is then."""
    try:
        yield
    except KeyboardInterrupt:
        _say_interrupted(left())


def print_json(data: object) -> None:
    """Data on stdout, as it is read back by `json.loads`."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def no_loading_bars() -> None:
    """Keep the loading bars and hints of transformers out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
