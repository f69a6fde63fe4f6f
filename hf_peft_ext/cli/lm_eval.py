"""`hf-peft-ext lm-eval`: lm-evaluation-harness with the adapters of this package."""

import sys
from collections.abc import Sequence

import typer


def lm_eval(arguments: Sequence[str]) -> None:
    """Run lm-evaluation-harness.

    Args:
        arguments: its own command line.

    Raises:
        typer.Exit: lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        typer.echo(f"lm-evaluation-harness is needed: pip install lm-eval ({error}).", err=True)
        raise typer.Exit(1) from error
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
