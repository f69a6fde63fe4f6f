"""`hf-peft-ext search`: a worker of a search, and the search's report, from the command line."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .draft import RecipeError, optional

HELP = """Search a design space for an architecture, S0 to S4, as a file says.

[cyan]model[/]     model_name_or_path, local_path, revision, dtype, attn_implementation
[cyan]tasks[/]     a name for each, with the keys of a recipe's `data` for SEQ_CLS,
          and metric: accuracy, f1 or matthews_correlation
[cyan]space[/]     budget, num_groups, strategies, stack
[cyan]training[/]  num_train_epochs, learning_rate, per_device_train_batch_size,
          per_device_eval_batch_size, warmup_ratio, lr_scheduler_type,
          weight_decay, max_grad_norm, bf16
[cyan]search[/]    storage, study_name, n_models, seed, early_stopping, heartbeat,
          output_dir

The command is a worker. It may be started several times, at once or one after
the other; all that was done stands in the database that `storage` names.

\b
  hf-peft-ext search --config examples/search.yaml
  hf-peft-ext search --config examples/search.yaml --set search.n_models=4
  hf-peft-ext search report --config examples/search.yaml
"""

app = typer.Typer(help=HELP, invoke_without_command=True, add_completion=False, rich_markup_mode="rich")
out, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)

Config = Annotated[Path, typer.Option("--config", help="The search, a YAML file.", show_default=False)]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to it.")]


@app.callback()
def search(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", help="The search, a YAML file.")] = None,
    changes: Changes = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    if config is None:
        raise typer.BadParameter("is missing", param_hint="--config")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for programmers
    try:
        optional("optuna", "search")
        from .search import SearchRecipe

        wanted = SearchRecipe.read(config, changes or ())
        worker = wanted.load()
        result = worker.search()
    except (RecipeError, RuntimeError, ValueError) as error:  # of runs they are recorded
        errors.print(f"[bold red]Error[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    for decision in result.decisions:
        tie = "  (a tie)" if decision.tie else ""
        out.print(f"[cyan]{decision.stage}[/]  {escape(decision.winner)}  {decision.means[decision.winner]:.4f}{tie}")
    folder = Path(wanted.search.output_dir)
    write(result, folder)
    result.config.save_pretrained(str(folder))
    out.print(f"[cyan]config[/]  {folder / 'adapter_config.json'}")


@app.command()
def report(config: Config, changes: Changes = None) -> None:
    """Write report.html and runs.csv of a search, finished or not."""
    try:
        optional("optuna", "search")
        from ..trainers.search import SearchResult
        from .search import SearchRecipe

        wanted = SearchRecipe.read(config, changes or ())
        settings = wanted.search
        result = SearchResult.load(settings.storage, settings.study_name)
    except (RecipeError, ValueError) as error:
        errors.print(f"[bold red]Error[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    write(result, Path(settings.output_dir))


def write(result, folder: Path) -> None:
    from ..trainers.search import write_report

    out.print(f"[cyan]report[/]  {write_report(result, folder)}")
