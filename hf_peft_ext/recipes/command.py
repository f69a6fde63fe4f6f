"""`hf-peft-ext train`: a recipe from the command line."""

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

from ..hub_cards import CardWarning
from ..writable import check_writable
from . import runs
from .failures import one_line
from .progress import lines_for_bars, no_bars
from .recipe import FILE, Recipe


def train(path: Path, changes: Sequence[str], dry_run: bool) -> None:
    """Carry out the command; `hf_peft_ext_cli` says what its arguments are.

    Raises:
        typer.Exit: something failed, which has been said.
    """
    first = int(os.environ.get("RANK", 0)) == 0  # of several processes, the one that speaks
    out, errors = (Console(stderr=e, quiet=not first, soft_wrap=True, highlight=False) for e in (False, True))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for programmers: python -W default -m hf_peft_ext.cli shows them
        warnings.simplefilter("default", CardWarning)
    with TemporaryDirectory() as nowhere, one_line(errors):
        recipe = Recipe.read(path, changes)
        check_writable("training.output_dir", recipe.training.output_dir)
        if dry_run:  # a Trainer makes its folder, and its repository on the Hub, as soon as it is there
            recipe.training.output_dir, recipe.training.push_to_hub = nowhere, False
        no_bars()
        trainer = runs.prepare(recipe)
        out.print(plan(recipe, trainer))
        if dry_run:
            out.print("\nThe recipe, changes included:\n", Text(recipe.text()), sep="\n")
        else:
            lines_for_bars(trainer)
            out.print(report(recipe, runs.train(recipe, trainer)))


def plan(recipe: Recipe, trainer: Any) -> Table:
    """What will be done."""
    args = recipe.training
    trainable, total = trainer.model.get_nb_trainable_parameters()
    train, evaluated = (0 if rows is None else len(rows) for rows in (trainer.train_dataset, trainer.eval_dataset))
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    return rows(
        ("adapter", f"{recipe.written['peft']['peft_type']} on {recipe.model.model_name_or_path}"),
        ("parameters", f"{trainable:,} of {total:,} are trained ({trainable / total:.2%})"),
        ("data", f"{recipe.data.title}: {train} rows to train on, {evaluated} to evaluate on"),
        ("training", f"{length}, {batch} rows a step, {processes} on {args.device.type}"),
    )


def report(recipe: Recipe, outcome: runs.Outcome) -> Table:
    """What came out, where it lies, and what to do next."""
    measured = {name.removeprefix("eval_"): value for name, value in outcome.metrics.items()}
    shown = ["loss", "mean_token_accuracy", *recipe.metrics]
    return rows(
        *((name, f"{measured[name]:.4g}") for name in shown if name in measured),
        ("trained for", f"{outcome.seconds:,.0f} s"),
        ("adapter", f"{outcome.folder}"),
        ("recipe", f"{outcome.folder / FILE}"),
        ("next", f"hf-peft-ext push {outcome.folder} USER/NAME"),
    )


def rows(*pairs: tuple[str, str]) -> Table:
    table = Table("name", "value", box=None, show_header=False, pad_edge=False)
    for name, value in pairs:
        table.add_row(f"[cyan]{name}[/]", escape(value))
    return table
