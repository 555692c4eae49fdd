"""What every command line of this project does alike: errors, exit statuses, interruptions.

Imports nothing heavy: `--help` has to be quick.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from cluster_router.wire.errors import ChameleonError, RequestError, SetupError

FAILED = 1
"""Exit status of a command that could not do its work; sent again, it may."""
WRONG = 2
"""Exit status of a command that the caller has to change something for."""
INTERRUPTED = 130


class Commands(TyperGroup):
    """A group whose commands answer errors of this project with one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except ChameleonError as error:
            typer.echo(f"error: {error}", err=True)
            wrong = isinstance(error, SetupError | RequestError)
            raise typer.Exit(WRONG if wrong else FAILED) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


def command_line(help: str, completion: bool = False) -> typer.Typer:
    """An empty command line; `completion` adds --install-completion."""
    return typer.Typer(
        help=help,
        cls=Commands,
        no_args_is_help=True,
        add_completion=completion,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run `app` as the program `name`, on `arguments` or the process's own; its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app(args=None if arguments is None else list(arguments), prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@contextmanager
def interruptible(hint: str) -> Iterator[None]:
    """Ctrl-C ends what is within, and `hint` says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {hint}", err=True)
        raise typer.Exit(INTERRUPTED) from None
