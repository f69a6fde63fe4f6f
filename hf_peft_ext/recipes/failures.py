"""What a command says when it fails: one line, and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

# what a run can meet that is no fault of this package; anything else keeps its traceback, for a bug report
EXPECTED: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, ImportError)


@contextmanager
def one_line(errors: Console) -> Iterator[None]:
    """Say what failed in one line, and leave with 2 where a value must change, else with 1.

    Raises:
        typer.Exit: something failed.
    """
    try:
        yield
    except EXPECTED as error:
        if isinstance(error, typer.Exit):  # which is a RuntimeError
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        errors.print(f"[bold red]Error[/] {escape(text)}")
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error
