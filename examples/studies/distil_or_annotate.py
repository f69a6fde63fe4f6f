"""Label more rows, or distil a larger model? Score against money for a three-layer MiniLM on TREC and AG News.

    pip install -e ".[studies]"
    HF_PEFT_EXT_DATA=folder python examples/studies/distil_or_annotate.py --tasks trec
    python examples/studies/distil_or_annotate.py --report      # the table and the figure only

Kang et al. 2023 (https://arxiv.org/abs/2305.01645) compare two ways to improve a small model with N labels:

    label    spend the budget on labels, and train the small model on all labels
    distil   train the teacher on the N labels, and distil it on as many unlabelled rows as the rest of the budget
             pays for

Here the small model is every second layer of MiniLM-L6, and MiniLM-L6 is the teacher. Both train all weights but the
token embeddings with the same rate, and a run makes at least `steps` steps and at least `epochs` epochs. Labels are
bought in one order for each seed, so a larger budget has the labels of the smaller one.

The prices are options. The defaults are those of the paper's task WLP: 0.26 dollars a label; 1.875 dollars for an hour
of an A40; 432 distilled items an hour. Its teacher with 11 billion parameters took 10 hours on 1,000 labels and 38 on
5,000: 3 hours and 0.007 more for each label. MiniLM itself needs seconds, which would make distillation almost free.

A plan (`hf_peft_ext.budget.label_or_distil`) is made for each seed from a pilot: the small model on a quarter, half
and all of the N labels, the teacher on all of them, and distillation on 2.5, 5 and 10 % of the unlabelled rows, scored
on dev rows. Neither the pilot nor the dev rows are charged.

Each run is a row of runs.csv; a study that is started again continues. A seed takes 8 minutes of one core on TREC; on
AG News, with longer texts, perhaps 20.
"""

import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from distil_or_annotate_report import PILOT_SHARES, Prices, bought, distilled, pilot_labels, report
from hf_peft_ext.model.modes import evaluating
from hf_peft_ext.trainers import SoftLabelTrainer, soft_labels
from hf_peft_ext.trainers.soft_labels import SoftLabels
from hf_peft_ext.tuners.ladder.network import cut_depth
from runs import MINILM, RESULTS, Row, append, check_protocol, find_model, read, read_rows

console = Console()
KEYS = ("task", "seed", "run", "labels", "items")  # of a run


@dataclass
class Protocol:
    """The settings that all runs of an output share."""

    model: str = field(default=MINILM, metadata={"help": "The teacher: a BERT, its folder or Hub id."})
    pool: int = field(default=1200, metadata={"help": "Unlabelled rows."})
    dev_rows: int = field(default=200, metadata={"help": "Rows of train that score the pilot."})
    test_rows: int = field(default=300, metadata={"help": "Most test rows."})
    max_length: int = field(default=64, metadata={"help": "Most tokens of a row."})
    batch_size: int = field(default=8, metadata={"help": "Rows of a step."})
    steps: int = field(default=60, metadata={"help": "Least steps of a run."})
    epochs: int = field(default=2, metadata={"help": "Least epochs of a run."})
    lr: float = field(default=2e-4, metadata={"help": "Learning rate of all runs."})
    temperature: float = field(default=2.0, metadata={"help": "Of the soft labels."})


@dataclass
class Study:
    """Options of the command."""

    tasks: list[str] = field(default_factory=lambda: ["trec", "ag_news"])
    labels: list[int] = field(default_factory=lambda: [50, 200], metadata={"help": "Labels at hand, N."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data: Path = field(default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")))
    output: Path = field(default=RESULTS / "distil_or_annotate")
    report: bool = field(default=False, metadata={"help": "Only make the table and the figure."})


@dataclass(frozen=True)
class Draw:
    """The encoded rows of a task for one seed; `labelled` is in the order in which labels are bought."""

    labelled: list[Row]
    unlabelled: list[Row]
    dev: list[Row]
    test: list[Row]
    classes: int


def draw(study: Study, protocol: Protocol, task: str, seed: int, tokenizer: Any) -> Draw:
    """Draw the rows. Dev and test rows are the same for all seeds."""
    train, test = list(read(study.data, task, "train")), read(study.data, task, "dev")[: protocol.test_rows]
    classes = 1 + max(row["label"] for row in train)
    random.Random(0).shuffle(train)
    dev, rest = train[: protocol.dev_rows], train[protocol.dev_rows :]
    random.Random(seed).shuffle(rest)

    def encode(rows: list[Row], *more: str) -> list[Row]:
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=protocol.max_length).input_ids
        names = {"labels": "label"}
        return [
            {"input_ids": one, "attention_mask": [1] * len(one), **{name: row[names[name]] for name in more}}
            for one, row in zip(ids, rows, strict=True)
        ]

    labelled = encode(rest[: -protocol.pool], "labels")
    return Draw(labelled, encode(rest[-protocol.pool :]), encode(dev, "labels"), encode(test, "labels"), classes)


def teacher_of(protocol: Protocol, classes: int, seed: int) -> Any:
    """The large model with a new head."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(find_model(protocol.model), num_labels=classes)


def student_of(protocol: Protocol, classes: int, seed: int) -> Any:
    """Every second layer of the large model."""
    large = teacher_of(protocol, classes, seed)
    return cut_depth(large, list(range(0, large.config.num_hidden_layers, 2)))


def fit(model: Any, data: Any, seed: int, protocol: Protocol, collate: Any) -> None:
    """Train a model on rows with labels, or with soft labels."""
    steps = max(protocol.steps, ceil(protocol.epochs * len(data) / protocol.batch_size))
    model.get_input_embeddings().requires_grad_(False)  # half of the parameters, and most of an optimizer step
    soft = isinstance(data, SoftLabels)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            **{"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": protocol.batch_size},
            **{"learning_rate": protocol.lr, "lr_scheduler_type": "linear", "warmup_steps": 0.1, "seed": seed},
            **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"},
            **{"use_cpu": True, "train_sampling_strategy": "group_by_length"},
        )
        kwargs: dict[str, Any] = {"temperature": protocol.temperature} if soft else {}
        make = SoftLabelTrainer if soft else Trainer
        make(model, options, train_dataset=data, data_collator=collate, **kwargs).train()


def accuracy(model: Any, rows: Sequence[Row], collate: Any) -> float:
    """The share of right answers."""
    right, ordered = 0, sorted(rows, key=lambda row: len(row["input_ids"]))
    with evaluating(model), torch.no_grad():
        for first in range(0, len(ordered), 64):
            batch = collate(ordered[first : first + 64])
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


class Runs:
    """The runs of one task and seed; those that are done are in a file.

    Args:
        study, protocol, prices: the options.
        task, seed: the task and the seed.
    """

    def __init__(self, study: Study, protocol: Protocol, prices: Prices, task: str, seed: int):
        self.study, self.protocol, self.prices, self.task, self.seed = study, protocol, prices, task, seed
        tokenizer = AutoTokenizer.from_pretrained(find_model(protocol.model))
        self.collate = DataCollatorWithPadding(tokenizer)
        self.rows = draw(study, protocol, task, seed, tokenizer)
        self.file = study.output / "runs.csv"
        self.done = {tuple(row[name] for name in KEYS) for row in read_rows(self.file)}

    def is_done(self, run: str, labels: int, items: int = 0) -> bool:
        return tuple(map(str, (self.task, self.seed, run, labels, items))) in self.done

    def train(self, run: str, model: Any, data: Any, labels: int, items: int = 0) -> None:
        """Train a model and write its scores, unless they are written already."""
        start = time.process_time()
        fit(model, data, self.seed, self.protocol, self.collate)
        seconds = time.process_time() - start
        if self.is_done(run, labels, items):
            return  # a teacher that was trained again
        scores = {name: accuracy(model, getattr(self.rows, name), self.collate) for name in ("dev", "test")}
        values = (self.task, self.seed, run, labels, items)
        append(self.file, dict(zip(KEYS, values, strict=True)) | scores | {"seconds": round(seconds, 1)})
        self.done.add(tuple(map(str, values)))
        console.print(*values, *(f"{score:.3f}" for score in scores.values()), f"{seconds:.0f} s")

    def all(self) -> None:
        """Every run that is missing."""
        numbers = sorted(self.numbers_of_labels())
        if numbers[-1] > len(self.rows.labelled):
            raise SystemExit(f"`budgets` buy {numbers[-1]} labels, and {self.task} has {len(self.rows.labelled)}.")
        for n in numbers:
            if not self.is_done("label", n):
                model = student_of(self.protocol, self.rows.classes, self.seed)
                self.train("label", model, self.rows.labelled[:n], n)
        for n in self.study.labels:
            items = [u for u in sorted(self.numbers_of_items(n)) if not self.is_done("distil", n, u)]
            if items or not self.is_done("teacher", n):
                self.distil(n, items)

    def numbers_of_labels(self) -> set[int]:
        """Numbers of labels that the student is trained on: those of the pilot, and of each budget."""
        numbers = {n + bought(self.prices, budget) for n in self.study.labels for budget in self.prices.budgets}
        return numbers | {part for n in self.study.labels for part in pilot_labels(n)}

    def numbers_of_items(self, n: int) -> Iterator[int]:
        """Numbers of unlabelled rows that a teacher with n labels is distilled on."""
        pool = self.protocol.pool
        affordable = {distilled(self.prices, n, budget, pool) for budget in self.prices.budgets}
        yield from ({int(pool * share) for share in PILOT_SHARES} | affordable) - {0}

    def distil(self, n: int, items: Sequence[int]) -> None:
        """Train the teacher on n labels, and distil it on the first unlabelled rows."""
        teacher = teacher_of(self.protocol, self.rows.classes, self.seed)
        self.train("teacher", teacher, self.rows.labelled[:n], n)
        if not items:
            return
        with tempfile.TemporaryDirectory() as folder:
            soft_labels(teacher, self.rows.unlabelled, folder, self.collate, batch_size=64)
            for u in items:
                student = student_of(self.protocol, self.rows.classes, self.seed)
                self.train("distil", student, SoftLabels(self.rows.unlabelled[:u], folder), n, u)


def main(study: Study, protocol: Protocol, prices: Prices) -> None:
    """Make the missing runs, then the table and the figure."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    study.output.mkdir(parents=True, exist_ok=True)
    check_protocol(study.output / "protocol.json", asdict(protocol) | asdict(prices))
    if not study.report:
        torch.set_num_threads(1)
        for task in study.tasks:
            for seed in study.seeds:
                Runs(study, protocol, prices, task, seed).all()
    console.print(report(read_rows(study.output / "runs.csv"), prices, protocol.pool, protocol.dev_rows, study.output))


if __name__ == "__main__":
    main(*HfArgumentParser((Study, Protocol, Prices)).parse_args_into_dataclasses())  # pyright: ignore
