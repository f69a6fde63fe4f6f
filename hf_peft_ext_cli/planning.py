"""Commands that plan: memory, cost, labels or distillation, and the catalogue of methods."""

from pathlib import Path
from typing import Annotated

import typer

from hf_peft_ext_cli.app import Json, app

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


COST_HELP = """What does it cost to fine-tune, and to show examples in every prompt instead?

Counts FLOPs of training and of queries from a config alone, without loading
weights: by the papers' rules and by the modules, attention and adapter
included. Also the bytes of the examples' cached keys and values, and the
number of queries from which fine-tuning is cheaper.

\b
  hf-peft-ext cost --model MODEL --adapter UNIPELT --shots 32 --tokens-per-example 98
  hf-peft-ext cost --model config.json --adapter LORA:r=16 --shots 8 --tokens-per-example 60 --queries 5000
"""


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


ANNOTATE_HELP = """Label more rows, or distil a large model? Plan how to spend a budget.

The inputs are a YAML file: prices, pools, throughputs, and the scores of a
small pilot. Learning curves are fitted to the pilot. The result is the best
allocation of each strategy with its expected score, break-even budgets, and
the effect of each price. Changes follow the file: key=value.

\b
  hf-peft-ext annotate-or-distil examples/annotation.yaml
  hf-peft-ext annotate-or-distil examples/annotation.yaml budget=500 --figure plan.svg
"""


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
