"""`hf-peft-ext train`: trains an adapter by a recipe."""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hf_peft_ext.cli.failures import one_line
from hf_peft_ext.hub_cards import CardWarning
from hf_peft_ext.recipes import Outcome, prepare, train
from hf_peft_ext.recipes.progress import lines_for_bars, no_bars
from hf_peft_ext.recipes.recipe import RECIPE_FILE, Recipe


def train_command(path: Path, changes: Sequence[str], dry_run: bool) -> None:
    """Train an adapter, or show the plan.

    Args:
        path: the recipe's YAML file.
        changes: each `section.key=value`, or `key=value` if only one section has the key.
        dry_run: whether to train and write nothing.

    Raises:
        typer.Exit: an error was printed.
    """
    is_first = int(os.environ.get("RANK", 0)) == 0  # of several processes, only this one prints
    out, errors = (Console(stderr=e, quiet=not is_first, soft_wrap=True, highlight=False) for e in (False, True))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # for developers: python -W default -m hf_peft_ext.cli shows them
        warnings.simplefilter("default", CardWarning)
    with TemporaryDirectory() as unused, one_line(errors):
        recipe = Recipe.read(path, changes)
        recipe.check_writable()
        if dry_run:  # a Trainer creates its folder, and its repository on the Hub, at once
            recipe.training.output_dir, recipe.training.push_to_hub = unused, False
        no_bars()
        trainer = prepare(recipe)
        out.print(plan_table(recipe, trainer))
        if dry_run:
            out.print("\nThe recipe, changes included:\n", Text(recipe.text()), sep="\n")
        else:
            lines_for_bars(trainer)
            out.print(report_table(recipe, train(recipe, trainer)))


def plan_table(recipe: Recipe, trainer: Any) -> Table:
    """The plan of a run: adapter, data, length of training."""
    args = recipe.training
    trainable, total = trainer.model.get_nb_trainable_parameters()
    train, evaluated = (0 if rows is None else len(rows) for rows in (trainer.train_dataset, trainer.eval_dataset))
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    return table_of(
        ("adapter", f"{recipe.written['peft']['peft_type']} on {recipe.model.model_name_or_path}"),
        ("parameters", f"{trainable:,} of {total:,} are trained ({trainable / total:.2%})"),
        ("data", f"{recipe.data.title}: {train} rows to train on, {evaluated} to evaluate on"),
        ("training", f"{length}, {batch} rows a step, {processes} on {args.device.type}"),
    )


def report_table(recipe: Recipe, outcome: Outcome) -> Table:
    """The results of a run, its files, and the next command."""
    measured = {name.removeprefix("eval_"): value for name, value in outcome.metrics.items()}
    shown = ["loss", "mean_token_accuracy", *recipe.metrics]
    return table_of(
        *((name, f"{measured[name]:.4g}") for name in shown if name in measured),
        ("trained for", f"{outcome.seconds:,.0f} s"),
        ("adapter", f"{outcome.folder}"),
        ("recipe", f"{outcome.folder / RECIPE_FILE}"),
        ("next", f"hf-peft-ext push {outcome.folder} USER/NAME"),
    )


def table_of(*pairs: tuple[str, str]) -> Table:
    """A table of names and values."""
    table = Table("name", "value", box=None, show_header=False, pad_edge=False)
    for name, value in pairs:
        table.add_row(f"[cyan]{name}[/]", escape(value))
    return table
