"""`hf-peft-ext search`: a worker of a search, and the search's report."""

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from hf_peft_ext.cli.failures import one_line
from hf_peft_ext.recipes.progress import no_bars
from hf_peft_ext.recipes.recipe_source import optional

if TYPE_CHECKING:
    from hf_peft_ext.recipes.search import SearchRecipe

out, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)


def search_command(path: Path, changes: Sequence[str], as_json: bool = False) -> None:
    """Work on a search until it is finished; write its report and the resulting config.

    Args:
        path: the search's YAML file.
        changes: each `section.key=value`.
        as_json: whether to print the decisions as JSON.

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
        report = recipe.write_report(result)
        result.config.save_pretrained(recipe.search.output_dir)
    config = Path(recipe.search.output_dir) / "adapter_config.json"
    if as_json:
        decisions = [{"stage": d.stage, "winner": d.winner, "means": d.means, "tie": d.tie} for d in result.decisions]
        print(json.dumps({"decisions": decisions, "report": str(report), "config": str(config)}))
        return
    for decision in result.decisions:
        tie, score = "  (a tie)" if decision.tie else "", decision.means[decision.winner]
        out.print(f"[cyan]{decision.stage}[/]  {escape(decision.winner)}  {score:.4f}{tie}")
    out.print(f"[cyan]report[/]  {escape(str(report))}")
    out.print(f"[cyan]config[/]  {escape(str(config))}")


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
        out.print(f"[cyan]report[/]  {escape(str(recipe.write_report(recipe.result())))}")


def read_search(path: Path, changes: Sequence[str]) -> "SearchRecipe":
    """Read the search of a file. Its module is imported late: it needs the packages of an extra."""
    for module in ("optuna", "matplotlib"):
        optional(module, "search", "A search")
    from hf_peft_ext.recipes.search import SearchRecipe

    return SearchRecipe.read(path, changes)
