"""`hf-peft-ext train`: trains an adapter by a recipe."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback

from hf_peft_ext.cli.failures import console, one_line
from hf_peft_ext.cli.tables import print_values
from hf_peft_ext.hub_cards import CardWarning
from hf_peft_ext.recipes import Outcome, prepare, train
from hf_peft_ext.recipes.progress import lines_for_bars, no_bars
from hf_peft_ext.recipes.recipe import RECIPE_FILE, Recipe


def train_command(path: Path, changes: Sequence[str], dry_run: bool, as_json: bool = False) -> None:
    """Train an adapter, or show the plan.

    Args:
        path: the recipe's YAML file.
        changes: each `section.key=value`, or `key=value` if only one section has the key.
        dry_run: whether to train and write nothing.
        as_json: whether to print the results as JSON in place of the tables; the plan of a dry run as well.

    Raises:
        typer.Exit: an error was printed.
    """
    is_first = int(os.environ.get("RANK", 0)) == 0  # of several processes, only this one prints
    out, errors = console(sys.stdout, False), console(sys.stderr, True)
    out.quiet = errors.quiet = not is_first
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
        plan = plan_values(recipe, trainer)
        if not as_json:
            print_values(out, plan)
        if dry_run:
            print_dry_run(out, plan, recipe.text(), as_json and is_first)
            return
        lines_for_bars(trainer)
        for callback in (PrinterCallback, ProgressCallback) if as_json else ():  # they print each log on stdout
            trainer.remove_callback(callback)
        outcome = train(recipe, trainer)
        if not as_json:
            print_values(out, report_values(recipe, outcome))
        elif is_first:
            result = {"metrics": outcome.metrics, "seconds": outcome.seconds, "adapter": str(outcome.folder)}
            print(json.dumps(result | {"recipe": str(outcome.folder / RECIPE_FILE)}))


def print_dry_run(out: Console, plan: dict[str, str], recipe: str, as_json: bool) -> None:
    """Print the recipe of a dry run; with its plan as JSON."""
    if as_json:
        print(json.dumps({"plan": plan, "recipe": recipe}))
    else:
        out.print("\nThe recipe, changes included:\n", Text(recipe), sep="\n")


def plan_values(recipe: Recipe, trainer: Any) -> dict[str, str]:
    """The plan of a run: adapter, data, length of training."""
    args = recipe.training
    trainable, total = trainer.peft_model.get_nb_trainable_parameters()
    train, evaluated = (0 if rows is None else len(rows) for rows in (trainer.train_dataset, trainer.eval_dataset))
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    return {
        "adapter": f"{recipe.written['peft']['peft_type']} on {recipe.model.model_name_or_path}",
        "parameters": f"{trainable:,} of {total:,} are trained ({trainable / total:.2%})",
        "data": f"{recipe.data.title}: {train} rows to train on, {evaluated} to evaluate on",
        "training": f"{length}, {batch} rows a step, {processes} on {args.device.type}",
    }


def report_values(recipe: Recipe, outcome: Outcome) -> dict[str, str]:
    """The results of a run, its files, and the next command."""
    measured = {name.removeprefix("eval_"): value for name, value in outcome.metrics.items()}
    shown = ["loss", "mean_token_accuracy", *recipe.metrics]
    return {name: f"{measured[name]:.4g}" for name in shown if name in measured} | {
        "trained for": f"{outcome.seconds:,.0f} s",
        "adapter": str(outcome.folder),
        "recipe": str(outcome.folder / RECIPE_FILE),
        "next": f"hf-peft-ext push {outcome.folder} USER/NAME",
    }
