"""The command line `hf-peft-ext`: its commands and their options.

This module is outside the package, since `import hf_peft_ext` imports torch and transformers, which takes seconds.
Each command imports its modules when it runs; `--help` and `--version` import none.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train adapters, search for their architecture, and push them to the Hub.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # bug reports need Python's own traceback
)

TRAIN_HELP = """Train an adapter by a recipe. Save it with its training record and its recipe.

A recipe is a YAML file with these sections. Keys have the names of the Python
arguments:

\b
[cyan]model[/]         model_name_or_path, revision, dtype, attn_implementation, and
              local_path: a local copy of the model, which is loaded instead,
              gguf_file: its file, if it is a GGUF model
[cyan]quantization[/]  optional; arguments of transformers.BitsAndBytesConfig
[cyan]peft[/]          peft_type: UNIPELT, MAM, TFEW, LORA or any other type of peft
              task_type: SEQ_CLS, CAUSAL_LM or SEQ_2_SEQ_LM
              and the fields of that type's config
[cyan]data[/]          path, name, data_files, revision, as in load_dataset;
              train_split, eval_split, split_column,
              max_train_samples, max_eval_samples, and for
                SEQ_CLS: text_column (two for pairs), label_column, max_length,
                  problem_type (regression)
                CAUSAL_LM: text_column, or messages_column,
                  or prompt_column and response_column
                SEQ_2_SEQ_LM: prompt_column, response_column, max_length,
                  max_target_length
                T-Few, with a language model: prompt and choices (Jinja
                  templates), answer_column, use_chat_template
[cyan]training[/]      arguments of transformers.TrainingArguments for SEQ_CLS,
              trl.SFTConfig for CAUSAL_LM,
              Seq2SeqTrainingArguments for SEQ_2_SEQ_LM,
              TFewTrainingArguments for T-Few;
              output_dir is the folder of the adapter
[cyan]metrics[/]       optional list; for SEQ_CLS and T-Few: accuracy, f1,
              matthews_correlation; for regression: pearson, spearmanr;
              for SEQ_2_SEQ_LM: exact_match

Changes follow the file: section.key=value, or key=value if only one section
has the key. Values are YAML: section={...} replaces a section, section=null
removes it.

\b
  hf-peft-ext train examples/recipes/unipelt.yaml
  hf-peft-ext train examples/recipes/unipelt.yaml --dry-run
  hf-peft-ext train examples/recipes/unipelt.yaml peft.r=4 learning_rate=2e-3

On several processes (see examples/launch/README.md):

\b
  torchrun --nproc-per-node 2 -m hf_peft_ext.cli train RECIPE
  accelerate launch --config_file CONFIG -m hf_peft_ext.cli train RECIPE
"""

SEARCH_HELP = """Search for an adapter's architecture, through the design spaces S0 to S4.

The search is a YAML file with these sections:

[cyan]model[/]     model_name_or_path, local_path, revision, dtype, attn_implementation
[cyan]tasks[/]     a name for each task; below it the keys of a recipe's `data` for
          SEQ_CLS, and metric: accuracy, f1 or matthews_correlation
[cyan]space[/]     budget, num_groups, strategies, stack
[cyan]training[/]  num_train_epochs, learning_rate, per_device_train_batch_size,
          per_device_eval_batch_size, warmup_ratio, lr_scheduler_type,
          weight_decay, max_grad_norm, bf16
[cyan]search[/]    storage, study_name, n_models, seed, early_stopping, heartbeat,
          output_dir

Each command is a worker. Start several to share the work, or start one again
to continue: all results are in the database of `storage`.

\b
  hf-peft-ext search --config examples/search.yaml
  hf-peft-ext search --config examples/search.yaml --set search.n_models=4
  hf-peft-ext search report --config examples/search.yaml
"""


COMPARE_HELP = """Which method for my data? Compare methods on a recipe's model and rows.

Each method tries a few learning rates by successive halving on dev rows, then
trains with several seeds at the best one. The result is a table, an HTML page
and a recommendation, with the recommended adapter trained and saved. The
recipe's eval_split is read once, at the end, to score that adapter.

Methods: lora, dora, rslora, adalora, krona, vera, fourierft, oft, boft, shira,
ln_tuning, beft, unipelt, mam, s4, pfeiffer, houlsby, prefix, prefix_tuning,
prompt_tuning, p_tuning, ladder, ia3, tfew, bitfit, intrinsic, full (all
weights), none (the head only).

Each command is a worker. Start several to share the work, or start one again
to continue: all runs are in the database.

\b
  hf-peft-ext compare examples/recipes/unipelt.yaml
  hf-peft-ext compare RECIPE --methods lora,unipelt,full --budget 0.5% --seeds 5
  hf-peft-ext compare RECIPE --dev-split validation num_train_epochs=5
"""

INTRINSIC_HELP = """How few numbers must be trained? Measure the intrinsic dimension of a task.

Full fine-tuning gives the score to compare with. Then each seed searches for
the smallest d at which training d numbers, projected onto all parameters,
reaches 90 % of it. The result is d90 with its interval, and a figure.

The fields of the recipe's section peft count if its peft_type is INTRINSIC.
Its score must be better when higher: a classification or regression.

Each command is a worker. Start several to share the work, or start one again
to continue: all runs are in the database.

\b
  hf-peft-ext intrinsic-dimension RECIPE
  hf-peft-ext intrinsic-dimension RECIPE --smallest 30 --largest 30000 --rates 1/3,1,3
  hf-peft-ext intrinsic-dimension RECIPE 'peft={peft_type: INTRINSIC, task_type: SEQ_CLS, variant: layer}'
"""

COST_HELP = """What does it cost to fine-tune, and to show examples in every prompt instead?

Counts FLOPs of training and of queries from a config alone, without loading
weights: by the papers' rules and by the modules, attention and adapter
included. Also the bytes of the examples' cached keys and values, and the
number of queries from which fine-tuning is cheaper.

\b
  hf-peft-ext cost --model MODEL --adapter UNIPELT --shots 32 --tokens-per-example 98
  hf-peft-ext cost --model config.json --adapter LORA:r=16 --shots 8 --tokens-per-example 60 --queries 5000
"""

ANNOTATE_HELP = """Label more rows, or distil a large model? Plan how to spend a budget.

The inputs are a YAML file: prices, pools, throughputs, and the scores of a
small pilot. Learning curves are fitted to the pilot. The result is the best
allocation of each strategy with its expected score, break-even budgets, and
the effect of each price. Changes follow the file: key=value.

\b
  hf-peft-ext annotate-or-distil examples/annotation.yaml
  hf-peft-ext annotate-or-distil examples/annotation.yaml budget=500 --figure plan.svg
"""


MEMORY_HELP = """What fits? Estimate the peak memory of a training step from a model's config alone.

The real model and adapter run on tensors without data, so no weights are
loaded and no GPU is needed. A 7B model takes some ten seconds a method.

Methods: full, lora, qlora, unipelt, qunipelt, ladder, qladder, plug_in (the
stage that trains the paper's bridge), or folders of saved adapters.

\b
  hf-peft-ext memory meta-llama/Llama-2-7b-hf --length 2048 --dtype bfloat16
  hf-peft-ext memory MODEL --methods lora,qlora --card RTX-4090 --largest batch
  hf-peft-ext memory ./folder --methods ./adapter --figure memory.svg
"""


METHODS_HELP = """Which methods are there? The catalogue: those of peft and of this package.

Each with its kind, what it costs in storage, memory and at inference, and what
it can do: start at the base model, merge, become LoRA, mix in a batch. With
--for, the parameters that it trains and stores on a model, from the model's
config alone. With a NAME everything about one method, or why it is refused.

\b
  hf-peft-ext methods
  hf-peft-ext methods --for meta-llama/Llama-2-7b-hf
  hf-peft-ext methods KronA --json
"""

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

IMPORT_HELP = """Import an adapter of AdapterHub's library, and save it as an adapter of peft.

The base model is loaded to find its modules. An ungated lora or ia3 becomes
peft's own; others become methods of this package.

\b
  hf-peft-ext import-adapterhub ./my_adapter ./my_peft_adapter
  hf-peft-ext import-adapterhub AdapterHub/some_adapter OUT --model bert-base-uncased
"""

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


def show_version(wanted: bool) -> None:
    """Print the versions that a bug report should name, and exit."""
    if wanted:
        typer.echo(f"hf_peft_ext {installed('hf_peft_ext')}")
        typer.echo(", ".join(f"{name} {installed(name)}" for name in ("peft", "transformers", "torch")))
        raise typer.Exit


def installed(name: str) -> str:
    """The installed version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "0+unknown" if name == "hf_peft_ext" else "is not installed"


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a YAML file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.", show_default=False)
]


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Train adapters, search for their architecture, and push them to the Hub.

    Every command has its own `--help`.
    """


@app.command(help=TRAIN_HELP)
def train(
    recipe: RecipeFile,
    changes: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load model and data and print the plan; train and write nothing.")
    ] = False,
    json: Json = False,
) -> None:
    from hf_peft_ext.cli.train import train_command

    train_command(recipe, changes or (), dry_run, json)


@app.command(help=COMPARE_HELP)
def compare(
    recipe: RecipeFile,
    changes: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas. LoRA is the reference.")
    ] = "lora,unipelt,mam,s4,ia3,bitfit,full",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Trained parameters of each method: a share of the model (0.5%) or a number.",
            show_default="the methods' own sizes",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method at its best learning rate.")] = 3,
    rates: Annotated[
        str, typer.Option(help="Factors on each method's usual learning rate, to choose from.")
    ] = "1/3,1,3",
    dev_split: Annotated[
        str | None, typer.Option(help="The split to choose by.", show_default="held-out training rows")
    ] = None,
    dev_share: Annotated[float, typer.Option(help="Share of the training rows to hold out.")] = 0.2,
    general_text: Annotated[
        str | None,
        typer.Option(help="A file of texts, one a line, to measure retention on.", show_default="a few sentences"),
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output", help="Folder of the results.")] = Path("compare"),
    storage: Annotated[
        str | None, typer.Option(help="URL of the database.", show_default="a SQLite file in the folder")
    ] = None,
    study_name: Annotated[str, typer.Option(help="The comparison's name in the database.")] = "compare",
    train_winner: Annotated[bool, typer.Option(help="Train and save the recommended method.")] = True,
    json: Json = False,
) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: no lines of its profiler
    from hf_peft_ext.cli.compare import compare_command

    options = {"methods": [name.strip() for name in methods.split(",")], "budget": budget, "seeds": seeds}
    options |= {"rates": rates, "dev_split": dev_split, "dev_share": dev_share, "general_text": general_text}
    options |= {"output_dir": output_dir, "storage": storage, "study_name": study_name, "train_winner": train_winner}
    compare_command(recipe, changes or (), options, json)


@app.command("intrinsic-dimension", help=INTRINSIC_HELP)
def intrinsic_dimension(
    recipe: RecipeFile,
    changes: Overrides = None,
    seeds: Annotated[int, typer.Option(help="Number of searches, each with a projection of its own.")] = 3,
    share: Annotated[float, typer.Option(help="Share of full fine-tuning's score to reach.")] = 0.9,
    smallest: Annotated[int, typer.Option(help="The smallest d to try.")] = 10,
    largest: Annotated[int, typer.Option(help="The largest d to try.")] = 10_000,
    precision: Annotated[float, typer.Option(help="Factor between a d that misses and one that reaches it.")] = 1.5,
    rates: Annotated[str, typer.Option(help="Factors on the usual learning rates; the best one counts.")] = "1",
    dev_split: Annotated[
        str | None, typer.Option(help="The split to score on.", show_default="held-out training rows")
    ] = None,
    dev_share: Annotated[float, typer.Option(help="Share of the training rows to hold out.")] = 0.2,
    output_dir: Annotated[Path, typer.Option("--output", help="Folder of the results.")] = Path("intrinsic_dimension"),
    storage: Annotated[
        str | None, typer.Option(help="URL of the database.", show_default="a SQLite file in the folder")
    ] = None,
    study_name: Annotated[str, typer.Option(help="The measurement's name in the database.")] = "intrinsic_dimension",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    from hf_peft_ext.cli.intrinsic_dimension import intrinsic_dimension_command

    options = {"seeds": seeds, "share": share, "smallest": smallest, "largest": largest, "precision": precision}
    options |= {"rates": rates, "dev_split": dev_split, "dev_share": dev_share, "output_dir": output_dir}
    options |= {"storage": storage, "study_name": study_name}
    intrinsic_dimension_command(recipe, changes or (), options, json)


@app.command(help=MEMORY_HELP)
def memory(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or config.json.", show_default=False)],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas.", show_default="full,lora,qlora,unipelt,ladder,plug_in as they apply"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch, on each device.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    target_length: Annotated[
        int | None, typer.Option(help="Tokens of an answer (encoder-decoder).", show_default="length")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights.", show_default="the config's")] = None,
    autocast: Annotated[
        str | None, typer.Option(help="bfloat16 or float16.", show_default="bfloat16 for quantized methods only")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="A name of TrainingArguments.optim.")] = "adamw_torch_fused",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute blocks in the backward pass.")] = False,
    attention: Annotated[str, typer.Option(help="sdpa, eager, flash, efficient or math.")] = "sdpa",
    quantization: Annotated[
        str | None, typer.Option(help="nf4, nf4-dq or int8.", show_default="nf4-dq for quantized methods")
    ] = None,
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    sharding: Annotated[str | None, typer.Option(help="zero1, zero2, zero3 or fsdp.")] = None,
    task_type: Annotated[
        str | None, typer.Option(help="peft's name: CAUSAL_LM, SEQ_CLS.", show_default="suits the model")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    card: Annotated[str | None, typer.Option(help="A GPU (H100, RTX-4090) or a size (24GiB).")] = None,
    largest: Annotated[str | None, typer.Option(help="batch or length: the largest that fits the card.")] = None,
    figure: Annotated[Path | None, typer.Option(help="A file for stacked bars: SVG, PNG or PDF.")] = None,
    json: Json = False,
) -> None:
    from hf_peft_ext.cli.memory import memory_command

    options = {"batch": batch, "length": length, "target_length": target_length, "dtype": dtype}
    options |= {"autocast": autocast, "optimizer": optimizer, "gradient_checkpointing": gradient_checkpointing}
    options |= {"attention": attention, "quantization": quantization, "devices": devices, "sharding": sharding}
    options |= {"task_type": task_type, "device": device}
    memory_command(model, methods, options, card=card, largest=largest, figure=figure, as_json=json)


@app.command(help=COST_HELP)
def cost(
    model: Annotated[str, typer.Option(help="The fine-tuned model: its name, folder or config.json.")],
    shots: Annotated[int, typer.Option(help="Examples in each prompt.")],
    tokens_per_example: Annotated[int, typer.Option(help="Tokens of an example.")],
    adapter: Annotated[
        str | None,
        typer.Option(help="A PEFT type, LORA or LORA:r=16, or an adapter's folder.", show_default="all weights"),
    ] = None,
    prompted_model: Annotated[
        str | None, typer.Option(help="The model to prompt.", show_default="the fine-tuned one")
    ] = None,
    query_tokens: Annotated[int, typer.Option(help="Tokens of a query and of a training row.")] = 103,
    target_tokens: Annotated[int, typer.Option(help="Tokens of a target, for an encoder-decoder.")] = 1,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Rows of a training step.")] = 8,
    queries: Annotated[int, typer.Option(help="Queries to answer.")] = 1000,
    price_per_gpu_hour: Annotated[float | None, typer.Option(help="To print money as well.")] = None,
    flops_per_second: Annotated[float | None, typer.Option(help="What the GPU really does, such as 1e14.")] = None,
    json: Json = False,
) -> None:
    from hf_peft_ext.cli.cost import cost_command

    work = {"shots": shots, "tokens_per_example": tokens_per_example, "query_tokens": query_tokens}
    work |= {"target_tokens": target_tokens, "steps": steps, "batch": batch, "queries": queries}
    cost_command(model, adapter, prompted_model, work, (price_per_gpu_hour, flops_per_second), json)


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
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-4,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text.", show_default="no limit")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the distillation.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    from hf_peft_ext.cli.to_lora import to_lora_command

    options = {"r": r, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    options |= {"max_length": max_length, "seed": seed}
    to_lora_command(adapter, output, recipe, changes or (), (texts, column), (model, bits), options, json)


@app.command("annotate-or-distil", help=ANNOTATE_HELP)
def annotate_or_distil(
    inputs: Annotated[Path, typer.Argument(metavar="INPUTS", help="The inputs: a YAML file.", show_default=False)],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the inputs.", show_default=False)
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Write score against budget to this file.")] = None,
    json: Json = False,
) -> None:
    from hf_peft_ext.cli.annotate import annotate_command

    annotate_command(inputs, changes or (), figure, json)


@app.command(help=METHODS_HELP)
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A method, for everything about it.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--for", metavar="MODEL", help="A model's name, folder or config.json: adds sizes.")
    ] = None,
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    from hf_peft_ext.cli.methods import methods_command

    methods_command(name, model, json, markdown)


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


search_app = typer.Typer(help=SEARCH_HELP, invoke_without_command=True, rich_markup_mode="rich")
app.add_typer(search_app, name="search")
Config = Annotated[Path, typer.Option("--config", help="The search: a YAML file.", show_default=False)]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change; may be repeated.")]


@search_app.callback()
def search(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", help="The search: a YAML file.")] = None,
    changes: Changes = None,
    json: Json = False,
) -> None:
    if context.invoked_subcommand is not None:
        return
    if config is None:
        raise typer.BadParameter("is missing", param_hint="--config")
    from hf_peft_ext.cli.search import search_command

    search_command(config, changes or (), json)


@search_app.command()
def report(config: Config, changes: Changes = None) -> None:
    """Write the report of a search, finished or not: report.html and runs.csv.

    Example: `hf-peft-ext search report --config examples/search.yaml`.
    """
    from hf_peft_ext.cli.search import report_command

    report_command(config, changes or ())


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


@app.command(
    "lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with adapters of this package. All arguments are its own.

    For example: hf-peft-ext lm-eval run --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks hellaswag
    """
    from hf_peft_ext.cli.lm_eval import lm_eval

    lm_eval(context.args)


if __name__ == "__main__":
    app()
