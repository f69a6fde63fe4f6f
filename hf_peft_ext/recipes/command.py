"""`hf-peft-ext train`: a recipe from the command line."""

import os
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..hub_cards import CardWarning
from . import runs
from .draft import RecipeError
from .recipe import FILE, Recipe

HELP = """Train an adapter as a recipe says; save it with its record and its recipe.

A recipe is a YAML file. Its sections, and their keys in the names of the
Python arguments:

\b
[cyan]model[/]         model_name_or_path, revision, dtype, attn_implementation, and
              local_path: where the same model lies on this machine,
              gguf_file: the file in it, where it is one in GGUF
[cyan]quantization[/]  those of transformers.BitsAndBytesConfig; none without it
[cyan]peft[/]          peft_type: UNIPELT, MAM, TFEW, LORA or any other that peft knows
              task_type: SEQ_CLS, CAUSAL_LM or SEQ_2_SEQ_LM
              and the fields of that type's config
[cyan]data[/]          path, name, data_files, revision, as in load_dataset;
              train_split, eval_split, split_column,
              max_train_samples, max_eval_samples, and for
                SEQ_CLS: text_column (two for pairs), label_column, max_length
                CAUSAL_LM: text_column, or messages_column,
                  or prompt_column and response_column
                SEQ_2_SEQ_LM: prompt_column, response_column, max_length,
                  max_target_length
                T-Few, of these two: prompt and choices, in Jinja,
                  answer_column, use_chat_template
[cyan]training[/]      those of transformers.TrainingArguments, for CAUSAL_LM of
              trl.SFTConfig, for SEQ_2_SEQ_LM of Seq2SeqTrainingArguments,
              with choices of TFewTrainingArguments;
              output_dir says where the adapter goes
[cyan]metrics[/]       a list: accuracy, f1, matthews_correlation (SEQ_CLS, T-Few),
              exact_match (SEQ_2_SEQ_LM)

Changes come behind the file, their values in YAML: section.key=value, or
key=value where one section alone has the key; section={...} for a whole
section, section=null for none.

\b
  hf-peft-ext train examples/recipes/unipelt.yaml
  hf-peft-ext train examples/recipes/unipelt.yaml --dry-run
  hf-peft-ext train examples/recipes/unipelt.yaml peft.r=4 learning_rate=2e-3

On several processes (examples/launch/README.md says more):

\b
  torchrun --nproc-per-node 2 -m hf_peft_ext.cli train RECIPE
  accelerate launch --config_file CONFIG -m hf_peft_ext.cli train RECIPE
"""


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything and print the plan; train and write nothing.")
    ] = False,
) -> None:
    first = int(os.environ.get("RANK", 0)) == 0  # of several processes, the one that speaks
    out, errors = (Console(stderr=e, quiet=not first, soft_wrap=True, highlight=False) for e in (False, True))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for programmers: python -W default -m hf_peft_ext.cli shows them
        warnings.simplefilter("default", CardWarning)
    with TemporaryDirectory() as nowhere:
        try:
            wanted = Recipe.read(recipe, changes or ())
            if dry_run:  # a Trainer makes its folder, and its repository on the Hub, as soon as it is there
                wanted.training.output_dir, wanted.training.push_to_hub = nowhere, False
            trainer = runs.prepare(wanted)
        except RecipeError as error:
            errors.print(f"[bold red]Error[/] {escape(str(error))}")
            raise typer.Exit(2) from None
    out.print(plan(wanted, trainer))
    if dry_run:
        out.print("\nThe recipe, changes included:\n", Text(wanted.text()), sep="\n")
    else:
        out.print(report(wanted, runs.train(wanted, trainer)))


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
