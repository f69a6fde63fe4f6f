"""Commands on saved adapters: inspect, export, import, push."""

from pathlib import Path
from typing import Annotated

import typer

from hf_peft_ext_cli.app import Json, Overrides, app

INSPECT_HELP = """What is in this adapter, and is it safe to load? What are a model's sites?

An adapter: its sub-layers, sizes, gates, base model, hashes, and whether peft
alone and `load_adapter` load it. No pickle is read and no code is run; of the
base model only the config is read.

A model: its layers, the sites of sub-layers, and the names of its linear layers
for `target_modules`. Only its config is read.

\b
  hf-peft-ext inspect user/adapter
  hf-peft-ext inspect ./adapter --base ./model --json
  hf-peft-ext inspect meta-llama/Llama-2-7b-hf
"""


@app.command(help=INSPECT_HELP)
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder, a config.json or an id on the Hub.")],
    base: Annotated[
        str | None, typer.Option(help="An adapter's base model.", show_default="the one that it names")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json: Json = False,
) -> None:
    from hf_peft_ext.cli.inspect import inspect_command

    inspect_command(path, base, revision, json)


TO_LORA_HELP = """Export an adapter as a plain LoRA, for servers and tools that load nothing else.

Exactly, where a LoRA equals the adapter: low-rank branches without gates or
with fixed ones. Else by distillation on texts without labels; what was lost
is printed, and written into the LoRA's card.

Model and texts are those of the recipe beside the adapter. Changes to it
follow the folders: section.key=value. An adapter without a recipe needs
--texts: lines of a text file, or a column of a CSV or JSON lines file.

\b
  hf-peft-ext to-lora results/unipelt results/unipelt-lora
  hf-peft-ext to-lora ADAPTER OUTPUT --texts mails.txt --r 16 --steps 600
"""


@app.command("to-lora", help=TO_LORA_HELP)
def to_lora(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The LoRA's folder.", show_default=False)],
    changes: Overrides = None,
    r: Annotated[int, typer.Option("--r", help="Rank of the LoRA, at most this where it is exact.")] = 32,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe with the model and the rows.", show_default="the adapter's")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Further texts: TXT, CSV or JSONL.")] = None,
    column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    model: Annotated[
        str | None, typer.Option(help="The base model, in place of a recipe.", show_default="the adapter's")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8, to quantize that model.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of distillation.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Texts of a step.")] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate.", show_default="3e-4; 4e-3 without a fit")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text.", show_default="no limit")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the distillation.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    from hf_peft_ext.cli.to_lora import to_lora_command

    options = {"r": r, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    options |= {"max_length": max_length, "seed": seed}
    to_lora_command(adapter, output, recipe, changes or (), (texts, column), (model, bits), options, json)


IMPORT_HELP = """Import an adapter of AdapterHub's library, and save it as an adapter of peft.

The base model is loaded to find its modules. An ungated lora or ia3 becomes
peft's own; others become methods of this package.

\b
  hf-peft-ext import-adapterhub ./my_adapter ./my_peft_adapter
  hf-peft-ext import-adapterhub AdapterHub/some_adapter OUT --model bert-base-uncased
"""


@app.command("import-adapterhub", help=IMPORT_HELP)
def import_adapterhub(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder, or an id on the Hub.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="The base model.", show_default="the one that the adapter names")
    ] = None,
    task_type: Annotated[
        str | None, typer.Option(help="The model's head: CAUSAL_LM, SEQ_CLS.", show_default="suits the model")
    ] = None,
    json: Json = False,
) -> None:
    from hf_peft_ext.cli.adapterhub import import_command

    import_command(adapter, output, model, task_type, json)


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder of a saved adapter.", exists=True, file_okay=False)
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help='The repository: "user/name", or "name" for your own.')
    ],
    revision: Annotated[
        str | None, typer.Option(help='A branch, created if it is missing, or an open pull request: "refs/pr/1".')
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private. An existing one is not changed.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request; needs no write access.")
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option(help="First line of the commit message.", show_default="Upload adapter")
    ] = None,
    commit_description: Annotated[
        str | None, typer.Option(help="Description of the commit or the pull request.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Run all local checks and show the files to push; send nothing."),
    ] = False,
    json: Json = False,
) -> None:
    """Push a saved adapter to the Hub.

    Writes the adapter's card (README.md; your edits are kept) and uploads in one
    commit: weights as safetensors, their configuration, the tokenizer, card and
    figures, recipe, training record and trainer state. All other files are kept
    local: optimizers, pickled arguments such as training_args.bin, logs, hidden
    files. A file with an access token stops the push.

    Log in first with `hf auth login`, or set HF_TOKEN. There is no option for the
    token, since the shell's history would keep it. After a lost connection, run
    the same command again; uploaded weights are not sent twice.

    Example: `hf-peft-ext push out my-adapter`. To propose a change to somebody
    else's adapter: `hf-peft-ext push out their-team/their-adapter --create-pr`.
    """
    from hf_peft_ext.cli.push import push

    options = {"revision": revision, "private": private or None, "create_pr": create_pr}
    options |= {"commit_message": commit_message, "commit_description": commit_description}
    push(folder, repo_id, options, dry_run, json)
