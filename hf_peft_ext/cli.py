"""The command line: `hf-peft-ext --help`."""

import typer

from . import lm_eval_command
from .hub_cards.push_command import push
from .recipes import command as recipes
from .recipes import search_command

app = typer.Typer(
    help="Train adapters, search for them, and push them to the Hub.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
app.command("train", help=recipes.HELP)(recipes.train)
app.add_typer(search_command.app, name="search")
app.command()(push)
app.command("lm-eval", context_settings=lm_eval_command.OPTIONS)(lm_eval_command.lm_eval)


@app.callback()
def main() -> None:
    """Every command has its own `--help`."""


if __name__ == "__main__":  # torchrun -m hf_peft_ext.cli train ...
    app()
