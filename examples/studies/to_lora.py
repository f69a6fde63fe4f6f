"""What is lost when an adapter becomes a LoRA: UniPELT, MAM, S4, prefixes and ladders on MiniLM, by `to_lora`.

    pip install -e ".[studies]"
    python examples/studies/to_lora.py                                       # the support messages of examples/data
    HF_PEFT_EXT_DATA=folder python examples/studies/to_lora.py --tasks trec sst2

Each adapter is trained once on K rows, and exported at each rank, distilled on rows without their labels. `--starts`
compares the least-squares fit, KL, and both. Score, agreement and KL are on the task's test rows, of the LoRA as stock
peft loads it. Results: runs.csv and table.md in results/to_lora; an interrupted study continues.
"""

import csv
import os
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_peft_ext import (
    LadderConfig,
    LayerPrefixConfig,
    MAMConfig,
    S4Config,
    UniPELTConfig,
    recommended_learning_rate,
    to_lora,
)
from hf_peft_ext.export import DistillationSettings
from runs import MINILM, RESULTS, Row, append, check_protocol, find_model, quiet, read, read_rows

MESSAGES = Path(__file__).parents[1] / "data" / "support_messages.csv"
METHODS: dict[str, Any] = {
    "UniPELT": lambda: UniPELTConfig(task_type="SEQ_CLS", bottleneck_size=24),
    "MAM": lambda: MAMConfig(task_type="SEQ_CLS", bottleneck_size=64, num_virtual_tokens=16),
    "S4": lambda: S4Config(task_type="SEQ_CLS"),
    "prefix": lambda: LayerPrefixConfig(task_type="SEQ_CLS"),
    "ladder": lambda: LadderConfig(task_type="SEQ_CLS", modules_to_save=["classifier"]),
}


@dataclass
class Arguments:
    """Options of the command."""

    tasks: list[str] = field(default_factory=lambda: ["support"], metadata={"help": "support, trec, sst2."})
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    ranks: list[int] = field(default_factory=lambda: [8, 32])
    starts: list[str] = field(
        default_factory=lambda: ["fit"], metadata={"help": "fit; fit alone, without KL; zero, without the fit."}
    )
    seeds: list[int] = field(default_factory=lambda: [0])
    k: int = field(default=100, metadata={"help": "Rows that an adapter is trained on."})
    epochs: int = field(default=8, metadata={"help": "Epochs of an adapter."})
    unlabelled: int = field(default=320, metadata={"help": "Rows that a LoRA is distilled on, at most."})
    test_rows: int = field(default=320, metadata={"help": "Test rows, at most."})
    steps: int = field(default=100, metadata={"help": "Steps of distillation."})
    fit_rows: int = field(default=128, metadata={"help": "Rows of the least-squares fit."})
    length: int = field(default=64, metadata={"help": "Tokens of a text, at most."})
    data: Path = field(default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")))
    model: str = field(default=MINILM, metadata={"help": "An encoder: a folder or a Hub id."})
    report: bool = field(default=False, metadata={"help": "Make the table only."})
    output: Path = field(default=RESULTS / "to_lora")


@dataclass
class Task:
    """The rows of a task, as tokens with `labels`."""

    train: list[Row]
    texts: list[str]  # without labels
    test: list[Row]
    classes: int


def load_task(name: str, seed: int, tokenizer: Any, args: Arguments) -> Task:
    """Draw the rows of a task for a seed: K with labels, others without; the test rows are the same for all seeds."""
    if name == "support":
        with MESSAGES.open(encoding="utf-8") as file:
            rows = [{**row, "label": row["intent"]} for row in csv.DictReader(file)]
        splits = [[row for row in rows if row["split"] == split] for split in ("train", "test")]
    else:
        splits = [list(read(args.data, name, split)) for split in ("train", "dev")]
    labels = sorted({row["label"] for row in splits[0]})
    train = random.Random(seed).sample(splits[0], len(splits[0]))
    test = random.Random(0).sample(splits[1], min(args.test_rows, len(splits[1])))

    def tokens(rows: list[Row]) -> list[Row]:
        encoded = [dict(tokenizer(row["text"], truncation=True, max_length=args.length)) for row in rows]
        return [{**e, "labels": labels.index(row["label"])} for e, row in zip(encoded, rows, strict=True)]

    test.sort(key=lambda row: len(row["text"]))
    texts = [row["text"] for row in train[: args.unlabelled]]
    return Task(tokens(train[: args.k]), texts, tokens(test), len(labels))


def base_model(args: Arguments, classes: int) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(find_model(args.model), num_labels=classes)


def adapter(name: str, method: str, seed: int, task: Task, tokenizer: Any, args: Arguments) -> Any:
    """The trained adapter of a run, from its folder if it was trained before."""
    folder = args.output / "adapters" / f"{name}-{method}-{seed}"
    if not (folder / "adapter_config.json").exists():
        config: PeftConfig = METHODS[method]()
        set_seed(seed)
        with tempfile.TemporaryDirectory() as unused:
            options = TrainingArguments(
                **{"output_dir": unused, "num_train_epochs": args.epochs, "per_device_train_batch_size": 8},
                **{"learning_rate": recommended_learning_rate(config), "warmup_steps": 0.1, "seed": seed},
                **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"},
                **{"use_cpu": True, "train_sampling_strategy": "group_by_length"},
            )
            model = get_peft_model(base_model(args, task.classes), config)
            Trainer(model, options, train_dataset=task.train, processing_class=tokenizer).train()  # pyright: ignore
        model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(base_model(args, task.classes), str(folder)).eval()


@torch.no_grad()
def logits(model: Any, rows: list[Row], tokenizer: Any) -> Tensor:  # shape: (rows, classes)
    """The logits of rows, in batches of 32."""
    inputs = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
    batches = (tokenizer.pad(inputs[i : i + 32], return_tensors="pt") for i in range(0, len(inputs), 32))
    return torch.cat([model(**batch).logits for batch in batches])


def export(key: Row, model: Any, task: Task, tokenizer: Any, args: Arguments) -> Row:
    """Export an adapter, load the LoRA by peft alone, and measure it on the test rows."""
    start = {
        "fit": {"fit_rows": args.fit_rows, "steps": args.steps},
        "fit alone": {"fit_rows": args.fit_rows, "steps": 0},
        "zero": {"fit_rows": 0, "steps": args.steps, "learning_rate": 1e-3},
    }[key["start"]]
    settings = DistillationSettings(**start, max_length=args.length, seed=int(key["seed"]))
    folder, began = args.output / "loras" / "-".join(map(str, key.values())), perf_counter()
    made = to_lora(model, folder, r=key["r"], texts=task.texts, tokenizer=tokenizer, eval_rows=task.test,
                   settings=settings, progress=None)  # fmt: skip
    seconds = perf_counter() - began
    assert made.fidelity is not None
    (score,) = made.fidelity.scores
    original = logits(model, task.test, tokenizer)
    loaded = logits(
        PeftModel.from_pretrained(base_model(args, task.classes), str(folder)).eval(), task.test, tokenizer
    )
    log_p, log_q = original.log_softmax(-1), loaded.log_softmax(-1)
    return {
        **key,
        **{"original": score.adapter.value, "base": score.base.value, "lora": score.lora.value},
        **{"difference": score.difference.value, "low": score.difference.low, "high": score.difference.high},
        "agreement": (original.argmax(-1) == loaded.argmax(-1)).float().mean().item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        **{"kl_base": made.fidelity.kl_base, "kl_held_out": made.fidelity.kl, "seconds": seconds},
    }


def table(runs: list[Row]) -> str:
    """A line for each task, method, rank and beginning: means over seeds."""
    names = ("original", "base", "lora", "agreement")
    header = ["task", "method", "r", "start", "original", "base", "LoRA", "LoRA - original", "alike", "KL", "s"]
    lines = [f"| {' | '.join(header)} |", "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    keys = dict.fromkeys((run["task"], run["method"], run["r"], run["start"]) for run in runs)
    for key in keys:
        own = [run for run in runs if (run["task"], run["method"], run["r"], run["start"]) == key]
        means = {name: 100 * fmean(float(run[name]) for run in own) for name in names}
        differences = [100 * float(run["difference"]) for run in own]
        low, high = (100 * float(own[0][name]) for name in ("low", "high"))
        spread = f" ± {stdev(differences):.1f}" if len(own) > 1 else f" [{low:+.1f}, {high:+.1f}]"
        kl, seconds = (fmean(float(run[name]) for run in own) for name in ("kl", "seconds"))
        cells = [*key, *(f"{means[name]:.1f}" for name in names[:3]), f"{fmean(differences):+.1f}{spread}"]
        cells += [f"{means['agreement']:.1f}", f"{kl:.3f}", f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    quiet()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.report:
        kept = ("k", "epochs", "unlabelled", "test_rows", "steps", "fit_rows", "length")
        check_protocol(args.output / "protocol.json", {name: getattr(args, name) for name in kept})
        tokenizer = AutoTokenizer.from_pretrained(find_model(args.model))
        names = ("task", "method", "seed", "r", "start")
        for task_name in args.tasks:
            for seed in args.seeds:
                task = load_task(task_name, seed, tokenizer, args)
                for method in args.methods:
                    done = {tuple(row[name] for name in names) for row in read_rows(args.output / "runs.csv")}
                    keys = [(task_name, method, seed, r, start) for r in args.ranks for start in args.starts]
                    for key in (key for key in keys if tuple(map(str, key)) not in done):
                        model = adapter(task_name, method, seed, task, tokenizer, args)
                        try:
                            row = export(dict(zip(names, key, strict=True)), model, task, tokenizer, args)
                        except ValueError as error:  # a LoRA closer to the base model is not written
                            print(key, error, flush=True)
                            continue
                        append(args.output / "runs.csv", row)
                        print(row, flush=True)
    text = table(read_rows(args.output / "runs.csv"))
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
