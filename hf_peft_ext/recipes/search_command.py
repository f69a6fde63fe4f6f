"""`hf-peft-ext search`: a worker of a search, and the search's report, from the command line."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from ..writable import check_writable
from .draft import optional
from .failures import one_line
from .progress import no_bars

if TYPE_CHECKING:
    from ..trainers.search import SearchResult
    from .search import SearchRecipe

out, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)


def search(path: Path, changes: Sequence[str]) -> None:
    """Work on a search until it is done; `hf_peft_ext_cli` says what the arguments are.

    Raises:
        typer.Exit: something failed, which has been said. Failures of single runs are recorded in the search instead.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for programmers
    with one_line(errors):
        wanted = read(path, changes)
        folder = Path(wanted.search.output_dir)
        check_writable("search.output_dir", folder)
        no_bars()
        with wanted.explained():
            result = wanted.load().search()
        for decision in result.decisions:
            tie, score = "  (a tie)" if decision.tie else "", decision.means[decision.winner]
            out.print(f"[cyan]{decision.stage}[/]  {escape(decision.winner)}  {score:.4f}{tie}")
        write(result, folder)
        result.config.save_pretrained(str(folder))
        out.print(f"[cyan]config[/]  {folder / 'adapter_config.json'}")


def report(path: Path, changes: Sequence[str]) -> None:
    """Write the report of a search, finished or not.

    Raises:
        typer.Exit: something failed, which has been said.
    """
    with one_line(errors):
        wanted = read(path, changes)
        check_writable("search.output_dir", wanted.search.output_dir)
        from ..trainers.search import SearchResult

        with wanted.explained():
            result = SearchResult.load(wanted.search.storage, wanted.search.study_name)
        write(result, Path(wanted.search.output_dir))


def read(path: Path, changes: Sequence[str]) -> "SearchRecipe":
    """The search of a file. Its module is imported here: it needs what comes with an extra."""
    for module in ("optuna", "matplotlib"):
        optional(module, "search", "A search")
    from .search import SearchRecipe

    return SearchRecipe.read(path, changes)


def write(result: "SearchResult", folder: Path) -> None:
    from ..trainers.search import write_report

    out.print(f"[cyan]report[/]  {escape(str(write_report(result, folder)))}")
