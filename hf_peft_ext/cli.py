"""The command line: `hf-peft-ext --help`."""

import typer

from . import lm_eval_command

app = typer.Typer(help="Train, push and load adapters of hf_peft_ext.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Every command has its own `--help`."""


app.command("lm-eval", context_settings=lm_eval_command.OPTIONS)(lm_eval_command.lm_eval)
