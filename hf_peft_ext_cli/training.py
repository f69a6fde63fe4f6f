"""Commands that train: a recipe, a comparison, a measurement, a search; and the evaluation of the result."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hf_peft_ext_cli.app import Json, Overrides, RecipeFile, app

TRAIN_HELP = """Train an adapter by a recipe. Save it with its training record and its recipe.

A recipe is a YAML file with these sections. Keys have the names of the Python
arguments:

\b
[cyan]model[/]         model_name_or_path, revision, dtype, attn_implementation, and
              local_path: a local copy of the model, which is loaded instead,
              gguf_file: its file, if it is a GGUF model
[cyan]quantization[/]  optional; arguments of transformers.BitsAndBytesConfig
[cyan]peft[/]          peft_type: UNIPELT, MAM, TFEW, LORA or any other type of peft
              task_type: SEQ_CLS, CAUSAL_LM, SEQ_2_SEQ_LM, or
              FEATURE_EXTRACTION, a model of sentence-transformers
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
                FEATURE_EXTRACTION: anchor_column, positive_column,
                  negative_column or score_column, max_length
                T-Few, with a language model: prompt and choices (Jinja
                  templates), answer_column, use_chat_template
[cyan]training[/]      arguments of transformers.TrainingArguments for SEQ_CLS,
              trl.SFTConfig for CAUSAL_LM,
              Seq2SeqTrainingArguments for SEQ_2_SEQ_LM,
              TFewTrainingArguments for T-Few,
              SentenceTransformerTrainingArguments for FEATURE_EXTRACTION;
              output_dir is the folder of the adapter
[cyan]metrics[/]       optional list; for SEQ_CLS and T-Few: accuracy, f1,
              matthews_correlation; for regression: pearson, spearmanr;
              for SEQ_2_SEQ_LM: exact_match;
              for FEATURE_EXTRACTION: cosine_ndcg@10, cosine_mrr@10,
              cosine_map@100, cosine_accuracy@1, cosine_precision@10,
              cosine_recall@10; with score_column:
              pearson_cosine, spearman_cosine

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


@app.command(
    "lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with adapters of this package. All arguments are its own.

    For example: hf-peft-ext lm-eval run --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks hellaswag
    """
    from hf_peft_ext.cli.lm_eval import lm_eval

    lm_eval(context.args)
