"""How large may the learning rate of a bottleneck be? By width and scaling, on the support messages of examples/data.

    python examples/studies/wide_bottlenecks.py
    python examples/studies/wide_bottlenecks.py --report

Each config is trained on 100 messages at rates that make the product of rate, scaling and width equal for all: Adam
moves the whole of W_up by the rate at the first steps, so that this product is how far the output moves. A run has
learned if its loss in the last quarter of the steps is below that of guessing by a tenth. An interrupted study
continues.
"""

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_peft_ext import BottleneckConfig, MAMConfig, UniPELTConfig
from hf_peft_ext.tuners.learning_rates import WIDEST_STEP, largest_rate
from runs import MINILM, RESULTS, Row, append, check_protocol, find_model, quiet, read_rows

MESSAGES = Path(__file__).parents[1] / "data" / "support_messages.csv"
TASK: dict[str, Any] = {"task_type": "SEQ_CLS"}
CONFIGS = {
    "Pfeiffer, 24": BottleneckConfig(style="pfeiffer", r=24, **TASK),
    "Pfeiffer, 512": BottleneckConfig(style="pfeiffer", r=512, **TASK),
    "Houlsby, 64": BottleneckConfig(style="houlsby", r=64, **TASK),
    "parallel, 512": BottleneckConfig(style="parallel", r=512, **TASK),
    "scaled parallel, 64": BottleneckConfig(style="scaled_parallel", r=64, **TASK),
    "scaled parallel, 512": BottleneckConfig(style="scaled_parallel", r=512, **TASK),
    "MAM, 64": MAMConfig(bottleneck_size=64, **TASK),
    "MAM, 512": MAMConfig(bottleneck_size=512, **TASK),
    "UniPELT, 512": UniPELTConfig(bottleneck_size=512, **TASK),
}


@dataclass
class Arguments:
    """Options of the command."""

    products: list[float] = field(
        default_factory=lambda: [0.15, 0.3, 0.6, 1.2], metadata={"help": "Rate times scaling times width."}
    )
    configs: list[str] = field(default_factory=lambda: list(CONFIGS), metadata={"help": ", ".join(CONFIGS)})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Draws of rows, heads and orders."})
    k: int = field(default=100, metadata={"help": "Training rows."})
    epochs: int = field(default=8, metadata={"help": "Epochs, in batches of 8."})
    report: bool = field(default=False, metadata={"help": "Make the table only."})
    output: Path = field(default=RESULTS / "wide_bottlenecks", metadata={"help": "Folder of the results."})


def rows_of(split: str, tokenizer: Any) -> list[Row]:
    """The messages of a split as tokens, with `labels`."""
    rows = [row for row in read_rows(MESSAGES) if row["split"] == split]
    intents = sorted({row["intent"] for row in rows})
    return [
        {**tokenizer(row["text"], truncation=True, max_length=64), "labels": intents.index(row["intent"])}
        for row in rows
    ]


def run(name: str, product: float, seed: int, args: Arguments, tokenizer: Any) -> Row:
    """Train a config, and score it on the test messages."""
    train, test = rows_of("train", tokenizer), rows_of("test", tokenizer)
    classes = 1 + max(row["labels"] for row in train)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: args.k].tolist()
    rate = product / WIDEST_STEP * largest_rate(CONFIGS[name])
    steps = args.epochs * math.ceil(args.k / 8)
    set_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(find_model(MINILM), num_labels=classes)
    with tempfile.TemporaryDirectory() as unused:
        options: dict[str, Any] = {
            **{"output_dir": unused, "max_steps": steps, "per_device_train_batch_size": 8, "seed": seed},
            **{"per_device_eval_batch_size": 64, "learning_rate": rate, "warmup_steps": 0.1, "save_strategy": "no"},
            **{"logging_steps": steps // 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True},
            "train_sampling_strategy": "group_by_length",
        }
        trainer = Trainer(
            get_peft_model(base, CONFIGS[name]),
            TrainingArguments(**options),
            train_dataset=[train[i] for i in chosen],  # pyright: ignore[reportArgumentType]
            processing_class=tokenizer,
            compute_metrics=accuracy,
        )
        trainer.train()
        score = trainer.evaluate(test)["eval_accuracy"]  # pyright: ignore[reportArgumentType]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    learned = losses[3] < math.log(classes) - 0.1
    return {
        **{"config": name, "product": product, "seed": seed, "learning_rate": f"{rate:.3g}"},
        **{"loss": round(losses[3], 3), "learned": int(learned), "accuracy": round(100 * score, 1)},
    }


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def table(runs: list[Row]) -> str:
    """A line for each config: at each product the accuracy of each seed, in brackets if it did not learn."""
    products = sorted({float(run["product"]) for run in runs})
    lines = [f"| bottleneck, width | {' | '.join(f'{p:g}' for p in products)} |", "|---|" + "--:|" * len(products)]
    for name in dict.fromkeys(run["config"] for run in runs):
        cells = []
        for product in products:
            own = [run for run in runs if run["config"] == name and float(run["product"]) == product]
            texts = [run["accuracy"] if int(run["learned"]) else f"({run['accuracy']})" for run in own]
            rate = f" at {own[0]['learning_rate']}" if own else ""
            cells.append(", ".join(texts) + rate)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # pyright: ignore[reportArgumentType]
    quiet()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "runs.csv"
    if not args.report:
        check_protocol(args.output / "protocol.json", {"k": args.k, "epochs": args.epochs})
        tokenizer = AutoTokenizer.from_pretrained(find_model(MINILM))
        for seed in args.seeds:
            for product in args.products:
                for name in args.configs:
                    done = {(row["config"], float(row["product"]), int(row["seed"])) for row in read_rows(file)}
                    if (name, product, seed) not in done:
                        row = run(name, product, seed, args, tokenizer)
                        append(file, row)
                        print(row, flush=True)
    text = table(read_rows(file))
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
