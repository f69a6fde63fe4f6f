"""Errors of a command: one line on stderr, and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

# Errors of files, values and packages. Any other error is a bug and keeps its traceback.
EXPECTED: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, ImportError)


@contextmanager
def one_line(errors: Console) -> Iterator[None]:
    """Print an expected error in one line and exit, with code 2 if a value must be changed, else with code 1.

    Args:
        errors: the console on stderr.

    Raises:
        typer.Exit: an expected error was printed.
    """
    try:
        yield
    except EXPECTED as error:
        if isinstance(error, typer.Exit):  # itself a RuntimeError
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        errors.print(f"[bold red]Error[/] {escape(text)}")
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error
