"""How the command line ends: our errors in one line, interruptions with what is left, JSON on its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from polymerge.errors import PolymergeError

NOTHING = "nothing was written"


class Commands(TyperGroup):
    """Commands in the order of definition; errors that are ours end in one line, others in a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PolymergeError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _say_interrupted(NOTHING)


def _say_interrupted(left: str) -> NoReturn:
    typer.echo(f"interrupted; {left}", err=True)
    raise typer.Exit(130) from None


@contextmanager
def interruptible(left: str) -> Iterator[None]:
    """Ctrl-C says what it leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        _say_interrupted(left)


def print_json(data: object) -> None:
    """Data on stdout, as it is read back by `json.loads`."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def no_loading_bars() -> None:
    """Keep the loading bars and hints of transformers out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
