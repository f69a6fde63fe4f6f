"""The application: what all commands share."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train adapters, search for their architecture, and push them to the Hub.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # bug reports need Python's own traceback
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a YAML file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.", show_default=False)
]


def show_version(wanted: bool) -> None:
    """Print the versions that a bug report should name, and exit."""
    if wanted:
        typer.echo(f"hf_peft_ext {installed('hf_peft_ext')}")
        typer.echo(", ".join(f"{name} {installed(name)}" for name in ("peft", "transformers", "torch")))
        raise typer.Exit


def installed(name: str) -> str:
    """The installed version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "0+unknown" if name == "hf_peft_ext" else "is not installed"


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Train adapters, search for their architecture, and push them to the Hub.

    Every command has its own `--help`.
    """
