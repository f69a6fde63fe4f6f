"""`hf-peft-ext lm-eval`: lm-evaluation-harness, with the adapters of this package known to it."""

import sys

import typer

OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness; what follows goes to its own command line.

    hf-peft-ext lm-eval run --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks hellaswag

    Raises:
        typer.Exit: lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        typer.echo(f"lm-evaluation-harness is needed: pip install lm-eval ({error}).", err=True)
        raise typer.Exit(1) from error
    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()
