"""The command line, `hf-peft-ext --help`: which commands there are, and their options.

A module beside the package, not in it: `import hf_peft_ext` registers the methods with peft, so it imports torch and
transformers, which takes seconds. A command imports what it needs when it runs; help and `--version` import nothing.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train adapters, search for them, and push them to the Hub.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a traceback of Python's own is what a bug report needs
)

TRAIN_HELP = """Train an adapter as a recipe says; save it with its record and its recipe.

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

SEARCH_HELP = """Search a design space for an architecture, S0 to S4, as a file says.

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


def show_version(wanted: bool) -> None:
    """Print the version and those of what it builds on, which a bug report should name; then leave."""
    if wanted:
        typer.echo(f"hf_peft_ext {installed('hf_peft_ext')}")
        typer.echo(", ".join(f"{name} {installed(name)}" for name in ("peft", "transformers", "torch")))
        raise typer.Exit


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "0+unknown" if name == "hf_peft_ext" else "is not installed"


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Every command has its own `--help`."""


@app.command(help=TRAIN_HELP)
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything and print the plan; train and write nothing.")
    ] = False,
) -> None:
    from hf_peft_ext.recipes.command import train

    train(recipe, changes or (), dry_run)


search_app = typer.Typer(help=SEARCH_HELP, invoke_without_command=True, rich_markup_mode="rich")
app.add_typer(search_app, name="search")
Config = Annotated[Path, typer.Option("--config", help="The search, a YAML file.", show_default=False)]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to it.")]


@search_app.callback()
def search(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", help="The search, a YAML file.")] = None,
    changes: Changes = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    if config is None:
        raise typer.BadParameter("is missing", param_hint="--config")
    from hf_peft_ext.recipes.search_command import search

    search(config, changes or ())


@search_app.command()
def report(config: Config, changes: Changes = None) -> None:
    """Write report.html and runs.csv of a search, finished or not."""
    from hf_peft_ext.recipes.search_command import report

    report(config, changes or ())


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder of a saved adapter.", exists=True, file_okay=False)
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help='The repository: "user/name", or "name" for one of your own.')
    ],
    revision: Annotated[
        str | None, typer.Option(help='A branch, made if it is missing, or an open pull request, "refs/pr/1".')
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private. One that exists stays as it is.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose it as a pull request; needs no right to write.")
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option(help="The commit's first line.", show_default="Upload adapter")
    ] = None,
    commit_description: Annotated[
        str | None, typer.Option(help="What else the commit or the pull request says.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all but what only the Hub knows; show what would go; send nothing."),
    ] = False,
) -> None:
    """Push a saved adapter to the Hub.

    Writes its card (README.md, keeping what you have edited) and uploads, in one commit, the files on a list:
    weights as safetensors, their configuration, the tokenizer, card and figures, recipe, training record and
    trainer state. All else stays here: optimizers, pickled arguments such as training_args.bin, logs, hidden
    files. A file that holds an access token stops the push.

    Log in first with `hf auth login`, or set HF_TOKEN. There is no option for the token: it would stay in the
    shell's history. After a lost connection run the same command again; weights that have arrived are not sent twice.

    For example: `hf-peft-ext push out my-adapter`, or, to propose a change to somebody else's adapter,
    `hf-peft-ext push out their-team/their-adapter --create-pr --commit-message "Trained for longer"`.
    """
    from hf_peft_ext.hub_cards.push_command import push

    options = {"revision": revision, "private": private or None, "create_pr": create_pr}
    options |= {"commit_message": commit_message, "commit_description": commit_description}
    push(folder, repo_id, options, dry_run)


@app.command(
    "lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness; what follows goes to its own command line.

    hf-peft-ext lm-eval run --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks hellaswag
    """
    from hf_peft_ext.lm_eval_command import lm_eval

    lm_eval(context.args)


if __name__ == "__main__":
    app()
