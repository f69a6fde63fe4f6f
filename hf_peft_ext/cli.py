"""The command line: `hf-peft-ext --help`."""

import typer

from .hub_cards.push_command import push

app = typer.Typer(help="Train, push and load adapters of hf_peft_ext.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Every command has its own `--help`."""


app.command()(push)
