"""Consoles of a command, and its errors: one line on stderr, and an exit code."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer
from rich.console import Console
from rich.markup import escape

# Errors of files, values and packages. Any other error is a bug and keeps its traceback.
EXPECTED: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, ImportError)

FILE_WIDTH = 200


def quiet_consoles() -> tuple[Console, Console]:
    """The consoles on stdout and stderr of a command that prints tables; warnings are switched off.

    Warnings are for developers, who ask for them by `python -W`. A terminal has its own width, a file 200 columns.
    Lines of text are not wrapped, so that paths can be copied; `print_table` fits tables to the width.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    return console(sys.stdout, stderr=False), console(sys.stderr, stderr=True)


def console(stream: TextIO, stderr: bool) -> Console:
    """A console on a stream."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(stderr=stderr, width=width, soft_wrap=True, highlight=False)


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
