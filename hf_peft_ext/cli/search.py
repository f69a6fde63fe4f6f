"""`hf-peft-ext search`: a worker of a search, and the search's report."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from hf_peft_ext.cli.failures import one_line
from hf_peft_ext.recipes.progress import no_bars
from hf_peft_ext.recipes.recipe_source import optional

if TYPE_CHECKING:
    from hf_peft_ext.recipes.search import SearchRecipe

out, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)


def search_command(path: Path, changes: Sequence[str]) -> None:
    """Work on a search until it is finished; write its report and the resulting config.

    Args:
        path: the search's YAML file.
        changes: each `section.key=value`.

    Raises:
        typer.Exit: an error was printed. Errors of single runs are recorded in the search instead.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # warnings are for developers
    with one_line(errors):
        recipe = read_search(path, changes)
        recipe.check_writable()
        no_bars()
        with recipe.recipe_errors():
            result = recipe.load().search()
        for decision in result.decisions:
            tie, score = "  (a tie)" if decision.tie else "", decision.means[decision.winner]
            out.print(f"[cyan]{decision.stage}[/]  {escape(decision.winner)}  {score:.4f}{tie}")
        print_report(recipe, result)
        result.config.save_pretrained(recipe.search.output_dir)
        out.print(f"[cyan]config[/]  {Path(recipe.search.output_dir) / 'adapter_config.json'}")


def report_command(path: Path, changes: Sequence[str]) -> None:
    """Write the report of a search, finished or not.

    Args:
        path: the search's YAML file.
        changes: each `section.key=value`.

    Raises:
        typer.Exit: an error was printed.
    """
    with one_line(errors):
        recipe = read_search(path, changes)
        recipe.check_writable()
        print_report(recipe, recipe.result())


def read_search(path: Path, changes: Sequence[str]) -> "SearchRecipe":
    """Read the search of a file. Its module is imported late: it needs the packages of an extra."""
    for module in ("optuna", "matplotlib"):
        optional(module, "search", "A search")
    from hf_peft_ext.recipes.search import SearchRecipe

    return SearchRecipe.read(path, changes)


def print_report(recipe: "SearchRecipe", result: Any) -> None:
    """Write the report and print its path."""
    out.print(f"[cyan]report[/]  {escape(str(recipe.write_report(result)))}")
