"""Intrinsic dimension: how few numbers must be trained, and does pretraining lower it?

    digits   scikit-learn's digits and a network of two hidden layers, as Li et al. 2018 have MNIST; with two widths
    text     a task on MiniLM-L6, pretrained and with random weights, as Aghajanyan et al. 2021 ask
    depth    a task on SmolLM2 cut to its first layers, pretrained and with random weights
    report   the table and the figures of all measurements in the folder

Each measurement is one of `measure_intrinsic_dimension`: full fine-tuning, then a bisection for each seed. One that
was interrupted continues, and several processes share one. The data are those of HF_PEFT_EXT_DATA.

    python examples/studies/intrinsic_dimension.py --stage digits
    python examples/studies/intrinsic_dimension.py --stage text --task trec --weights random
    python examples/studies/intrinsic_dimension.py --stage report
"""

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from peft import get_peft_model
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, HfArgumentParser

from hf_peft_ext import IntrinsicConfig
from hf_peft_ext.intrinsic_dimension import IntrinsicDimension, measure_intrinsic_dimension
from hf_peft_ext.intrinsic_dimension.figure import dimension_figure
from hf_peft_ext.intrinsic_dimension.result import RESULT_JSON
from runs import MINILM, RESULTS, SMOLLM2, Row, find_model, language_model, read

TEXTS = {"qnli": ["question", "sentence"]}
STAGES = ("digits", "text", "depth", "report")


@dataclass
class Arguments:
    """Options of the command."""

    stage: str = field(metadata={"help": ", ".join(STAGES)})
    task: str = field(default="trec", metadata={"help": "trec, sst2 or qnli."})
    weights: str = field(default="pretrained", metadata={"help": "pretrained or random."})
    layers: int = field(default=30, metadata={"help": "Stage depth: layers of SmolLM2 to keep."})
    variant: str = field(default="global", metadata={"help": "global, layer or tensor."})
    width: int = field(default=200, metadata={"help": "Stage digits: width of the hidden layers."})
    steps: int = field(default=400, metadata={"help": "Stage digits: training steps."})
    k: int = field(default=500, metadata={"help": "Training rows of a task."})
    dev: int = field(default=400, metadata={"help": "Rows to score on."})
    epochs: int = field(default=4, metadata={"help": "Epochs of each run on a task."})
    seeds: int = field(default=3, metadata={"help": "Searches."})
    smallest: int = field(default=10, metadata={"help": "The smallest d to try."})
    largest: int = field(default=10_000, metadata={"help": "The largest d to try."})
    precision: float = field(default=1.5, metadata={"help": "Width of a bracket at the end of a search."})
    rates: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Factors on the learning rates."})
    data: Path = field(
        default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")), metadata={"help": "Folder of the data."}
    )
    output: Path = field(default=RESULTS / "intrinsic_dimension", metadata={"help": "Folder of the results."})

    def measure(self, task: Any, name: str) -> None:
        """Measure a task into a folder of this name."""
        options = {key: getattr(self, key) for key in ("seeds", "smallest", "largest", "precision", "rates")}
        result = measure_intrinsic_dimension(task, **options, output_dir=self.output / name, **self.rows())
        Console().print(f"{name}: {result.sentence}")

    def rows(self) -> dict[str, Any]:
        """Where a task's dev rows are."""
        return {} if self.stage == "digits" else {"dev_split": "dev"}


class Digits:
    """A network on 8 x 8 pixel digits: trains d numbers or all parameters with Adam, and returns the test accuracy.

    Args:
        width: of the two hidden layers.
        steps: batches of 64, with a learning rate that falls to zero.
        variant: of `IntrinsicConfig`.
    """

    score = "accuracy"

    def __init__(self, width: int, steps: int, variant: Any):
        self.width, self.steps, self.variant = width, steps, variant
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels / 16, labels, test_size=0.3, random_state=0, stratify=labels)
        self.x, self.x_test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
        self.y, self.y_test = (torch.tensor(part) for part in parts[2:])

    def model(self, d: int | None, seed: int) -> nn.Module:
        """A network with random weights; with its subspace, unless `d` is None."""
        torch.manual_seed(seed)
        wide = self.width
        layers = nn.Linear(64, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 10)
        network = nn.Sequential(*layers)
        if d is None:
            return network
        return get_peft_model(network, IntrinsicConfig(d=d, seed=seed, variant=self.variant))  # pyright: ignore[reportArgumentType]

    def __call__(self, d: int | None, seed: int, rate: float) -> float:
        """Train, and return the accuracy on the test rows."""
        model = self.model(d, seed)
        lr = rate * (3e-3 if d is None else 3e-2)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            batch = torch.randint(len(self.x), (64,), generator=generator)
            F.cross_entropy(model(self.x[batch]), self.y[batch]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return (model(self.x_test).argmax(1) == self.y_test).float().mean().item()


def base_model(args: Arguments, folder: Path) -> str:
    """The folder of the base model, written if it is not the pretrained one."""
    if args.stage == "text" and args.weights == "pretrained":
        return find_model(MINILM)
    target = folder / "model"
    if (target / "config.json").exists():
        return str(target)
    torch.manual_seed(0)
    if args.stage == "text":
        model = AutoModel.from_config(AutoConfig.from_pretrained(find_model(MINILM)))
        tokenizer = AutoTokenizer.from_pretrained(find_model(MINILM))
    else:
        whole, tokenizer = language_model(SMOLLM2)
        whole.config.num_hidden_layers = args.layers
        model = AutoModel.from_config(whole.config)
        if args.weights == "pretrained":
            kept = {name: w for name, w in whole.model.state_dict().items() if name in model.state_dict()}
            model.load_state_dict(kept)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def recipe(args: Arguments, folder: Path) -> Path:
    """Write the rows and the recipe of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = TEXTS.get(args.task, ["text"])
    rows, path = folder / "rows.jsonl", folder / "recipe.yaml"
    parts = {split: drawn(read(args.data, args.task, split), n) for split, n in (("train", args.k), ("dev", args.dev))}
    lines = [
        json.dumps({**{c: row[c] for c in columns}, "label": str(row["label"]), "split": split}) + "\n"
        for split, part in parts.items()
        for row in part
    ]
    rows.write_text("".join(lines), encoding="utf-8")
    sections = {
        "model": {"model_name_or_path": base_model(args, folder)},
        "peft": {
            "peft_type": "INTRINSIC",
            "task_type": "SEQ_CLS",
            "variant": args.variant,
            "exclude_modules": ["word_embeddings", "embed_tokens"],
        },
        "data": {
            "data_files": str(rows),
            "split_column": "split",
            "text_column": columns if len(columns) > 1 else columns[0],
            "label_column": "label",
            "max_length": 64,
        },
        "training": {
            "output_dir": str(folder / "run"),
            "num_train_epochs": args.epochs,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "train_sampling_strategy": "group_by_length",
            "seed": 0,
            "use_cpu": not torch.cuda.is_available(),
        },
    }
    path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return path


def drawn(rows: list[Row], n: int) -> list[Row]:
    """n of the rows, the same for every measurement."""
    return random.Random(0).sample(rows, min(n, len(rows)))


def report(args: Arguments) -> None:
    """Write table.md, and a figure for each group of measurements: `digits`, and each task."""
    results: dict[str, IntrinsicDimension] = {}
    for path in sorted(args.output.glob(f"*/{RESULT_JSON}")):
        stored = json.loads(path.read_text("utf-8"))
        fields = {name: stored[name] for name in ("score", "share", "settings", "errors")}
        results[path.parent.name] = IntrinsicDimension(
            **fields,
            full={int(seed): score for seed, score in stored["full"].items()},
            scores={int(s): {int(d): x for d, x in scores.items()} for s, scores in stored["scores"].items()},
            brackets={int(seed): tuple(bracket) for seed, bracket in stored["brackets"].items()},
        )
    lines = [
        "| measurement | full fine-tuning | d90 | 95 % interval | of each seed | runs |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for name, result in results.items():
        d = "" if result.d is None else f"{result.d:.0f}"
        interval = "" if result.interval is None else f"{result.interval[0]:.0f} to {result.interval[1]:.0f}"
        each = ", ".join(bracket_text(*bracket) for bracket in result.brackets.values())
        runs = len(result.full) + sum(len(scores) for scores in result.scores.values())
        lines.append(f"| {name} | {fmean(result.full.values()):.3f} | {d} | {interval} | {each} | {runs} |")
    groups: dict[str, dict[str, IntrinsicDimension]] = {}
    for name, result in results.items():
        groups.setdefault(name.partition("-")[0], {})[name] = result
    for group, members in groups.items():
        dimension_figure(members).savefig(args.output / f"{group}.png", dpi=150)
    text = "# Intrinsic dimension\n\n" + "\n".join(lines) + "\n"
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


def bracket_text(low: int, high: int) -> str:
    """The bracket of a seed: "(316, 447]"."""
    if not high:
        return f"> {low}"
    return f"({low}, {high}]" if low else f"≤ {high}"


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # pyright: ignore[reportArgumentType]
    if args.stage not in STAGES:
        raise SystemExit(f"`stage` (={args.stage!r}) must be one of: {', '.join(STAGES)}.")
    variant = "" if args.variant == "global" else f"-{args.variant}"
    if args.stage == "report":
        report(args)
    elif args.stage == "digits":
        args.measure(Digits(args.width, args.steps, args.variant), f"digits-{args.width}{variant}")
    else:
        model = "minilm" if args.stage == "text" else f"smollm2-{args.layers}"
        name = f"{args.task}-{model}-{args.weights}{variant}"
        args.measure(recipe(args, args.output / name), name)


if __name__ == "__main__":
    main()
