"""UniPELT against its sub-modules on eight tasks with few examples: the low-resource study of the paper, made small.

    pip install -e ".[studies]"
    HF_PEFT_EXT_DATA=folder python examples/studies/unipelt_low_resource.py --k 100

Each run, one task, method, seed and learning rate, becomes a row of `runs.csv` in `--output` as soon as it is done;
started again, the study goes on with the runs that are missing. `--tasks`, `--methods`, `--seeds` and `--k` choose a
part of it, and two processes may share one output if they take different methods. At the end, or at once with
`--report`, it writes `table.md` and `figure.png` from the rows that are there. README.md beside this file has the
protocol, the results and a reading of them.
"""

import math
import os
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import transformers
from matplotlib.figure import Figure
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    get_linear_schedule_with_warmup,
)

from hf_peft_ext import BitFitConfig, BottleneckConfig, LayerPrefixConfig, UniPELTConfig
from runs import MINILM, RESULTS, Row, append, check_protocol, find_model, read, read_rows  # beside this file

BATCH_SIZE, MAX_LENGTH, WARM_UP = 8, 128, 0.1
TUNING_SEED = 0  # the seed whose runs choose the learning rate
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Batch = dict[str, Tensor]
console = Console(highlight=False, soft_wrap=True)


class Task(NamedTuple):
    """What a model reads, how many labels it knows (1: a score), and its measure: (labels, predictions) -> number."""

    texts: tuple[str, ...]
    labels: int
    measure: str
    metric: Callable[[Any, Any], Any]


class Method(NamedTuple):
    """A config, None for the whole model, and the learning rates to choose from."""

    config: PeftConfig | None
    rates: tuple[float, ...]


class Run(NamedTuple):
    """One training: it stands in one row."""

    task: str
    k: int
    method: str
    seed: int
    lr: float


def spearman(labels: Any, predictions: Any) -> float:
    return spearmanr(labels, predictions).statistic


TASKS = {
    "sst2": Task(("text",), 2, "accuracy", accuracy_score),
    "cola": Task(("text",), 2, "MCC", matthews_corrcoef),
    "mrpc": Task(("sentence1", "sentence2"), 2, "F1", f1_score),
    "rte": Task(("premise", "hypothesis"), 2, "accuracy", accuracy_score),
    "mnli": Task(("premise", "hypothesis"), 3, "accuracy", accuracy_score),
    "qnli": Task(("question", "sentence"), 2, "accuracy", accuracy_score),
    "stsb": Task(("sentence1", "sentence2"), 1, "Spearman", spearman),
    "trec": Task(("text",), 6, "accuracy", accuracy_score),
}

SEQ_CLS: dict[str, Any] = {"task_type": "SEQ_CLS"}  # trains the head in every method
BEGINNING: dict[str, Any] = {"init": "paper", **SEQ_CLS}  # of the stored results; the defaults start as the base model
METHODS = {
    "full": Method(None, (5e-5, 1e-4, 2e-4)),
    "BitFit": Method(BitFitConfig(**SEQ_CLS), (2e-3, 5e-3, 1e-2)),
    "adapter": Method(BottleneckConfig(style="pfeiffer", r=48, **BEGINNING), (1e-3, 2e-3, 5e-3)),
    "prefix": Method(LayerPrefixConfig(num_virtual_tokens=10, **BEGINNING), (1e-2, 3e-2, 1e-1)),
    "LoRA": Method(LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], **SEQ_CLS), (2e-3, 5e-3, 1e-2)),
    "AP": Method(UniPELTConfig(methods=("adapter", "prefix"), **BEGINNING), (1e-3, 2e-3, 5e-3)),
    "APL": Method(UniPELTConfig(**BEGINNING), (1e-3, 2e-3, 5e-3)),
    "APL-no-gates": Method(UniPELTConfig(gated=False, **BEGINNING), (1e-3, 2e-3, 5e-3)),
}
SUBMODULES = ["adapter", "prefix", "LoRA"]
RANKED = [name for name in METHODS if name != "APL-no-gates"]  # as in the paper's table; the last is an ablation


@dataclass
class Protocol:
    """What all runs in one output share."""

    model: str = field(default=MINILM, metadata={"help": "A name on the Hub or a folder; by default MiniLM-L6."})
    epochs: int = field(default=8, metadata={"help": "Most passes over the training examples."})
    evaluate_every: int = field(default=2, metadata={"help": "Epochs between two looks at dev."})
    patience: int = field(default=3, metadata={"help": "Looks at dev without a better one before training stops."})
    dev_rows: int = field(default=120, metadata={"help": "Dev examples, drawn from train beside the K."})
    test_rows: int = field(default=400, metadata={"help": "Most test examples, drawn from the task's own dev split."})
    tune_on: list[str] = field(
        default_factory=lambda: ["sst2", "stsb", "trec"],
        metadata={"choices": list(TASKS), "help": "Tasks by whose dev scores the learning rate is chosen."},
    )
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})


@dataclass
class Study:
    """Which runs, and where things are."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"choices": list(TASKS)})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"choices": list(METHODS)})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A draw of data and a head each."})
    k: list[int] = field(default_factory=lambda: [100, 500], metadata={"help": "Numbers of training examples."})
    data: Path = field(
        default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")),
        metadata={"help": "Folder of TASK.train.jsonl and TASK.dev.jsonl; by default $HF_PEFT_EXT_DATA."},
    )
    output: Path = field(default=RESULTS / "unipelt", metadata={"help": "Folder for what is written."})
    report: bool = field(default=False, metadata={"help": "Only make the table and the figure."})


def main(study: Study, protocol: Protocol) -> None:
    study.output.mkdir(parents=True, exist_ok=True)
    runs = study.output / "runs.csv"
    if not study.report:
        check_protocol(study.output / "protocol.json", asdict(protocol))
        for run in missing(study, protocol, runs):
            start = time.perf_counter()
            found = train_and_test(run, study.data, protocol)
            row = run._asdict() | found | {"seconds": round(time.perf_counter() - start, 1)}
            append(runs, row)
            console.print("  ".join(f"{name} {value}" for name, value in row.items()))
    rows = read_rows(runs)
    rates = chosen_rates(rows, protocol.tune_on)
    scores = read_scores(rows, rates)
    (study.output / "table.md").write_text(table(scores, rates), encoding="utf-8")
    draw(scores, study.output / "figure.png")
    console.print(f"Written: {study.output / 'table.md'} and figure.png beside it.")


def missing(study: Study, protocol: Protocol, runs: Path) -> Iterator[Run]:
    """The runs to do: for each K first those that choose a method's learning rate, then seed by seed."""
    for k in study.k:
        for method in study.methods:
            for task, lr in product(protocol.tune_on, METHODS[method].rates):
                yield from unless_done(Run(task, k, method, TUNING_SEED, lr), runs)
        for seed, task, method in product(study.seeds, study.tasks, study.methods):
            lr = chosen_rates(read_rows(runs), protocol.tune_on)[k, method]
            yield from unless_done(Run(task, k, method, seed, lr), runs)


def unless_done(run: Run, runs: Path) -> list[Run]:
    return [] if any(run_of(row) == run for row in read_rows(runs)) else [run]


def chosen_rates(rows: list[Row], tune_on: list[str]) -> dict[tuple[int, str], float]:
    """(K, method) -> the learning rate with the best mean dev score over the tasks to tune on, at the first seed."""
    dev = defaultdict(list)
    for row in rows:
        run = run_of(row)
        if run.seed == TUNING_SEED and run.task in tune_on:
            dev[run.k, run.method, run.lr].append(float(row["dev"]))
    best = sorted(dev, key=lambda key: (len(dev[key]), mean(dev[key])))  # the last of a K and method wins
    return {(k, method): lr for k, method, lr in best}


# Training


def train_and_test(run: Run, data: Path, protocol: Protocol) -> dict[str, Any]:
    """One run: the weights of the epoch that is best on dev, tested once."""
    task, method = TASKS[run.task], METHODS[run.method]
    source = find_model(protocol.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = random.Random(run.seed).sample(read(data, run.task, "train"), run.k + protocol.dev_rows)
    test = read(data, run.task, "dev")
    test = random.Random(0).sample(test, min(protocol.test_rows, len(test)))
    train, dev, test = (encode(part, task, tokenizer) for part in (rows[: run.k], rows[run.k :], test))

    torch.manual_seed(run.seed)  # the head of a seed is the same for all methods
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=task.labels)
    model = (model if method.config is None else get_peft_model(model, method.config)).to(DEVICE)
    if protocol.bf16:  # around each forward: autocast keeps its copies of the weights until it ends
        model.forward = torch.autocast(DEVICE.type, torch.bfloat16)(model.forward)
    score, epoch = fit(model, train, dev, task, run, protocol)
    tested = evaluate(model, test, task)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"dev": round(score, 4), "test": round(tested, 4), "epoch": epoch, "trained": trained}


def fit(model: nn.Module, train: Batch, dev: Batch, task: Task, run: Run, protocol: Protocol) -> tuple[float, int]:
    """AdamW, linear warm-up and decay, early stopping. Keeps the weights best on dev; their score, their epoch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.lr, fused=True)
    steps = protocol.epochs * math.ceil(run.k / BATCH_SIZE)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARM_UP * steps), steps)
    order = torch.Generator().manual_seed(run.seed)  # the same batches for all methods
    score, best, weights = -math.inf, 0, []
    for epoch in range(1, protocol.epochs + 1):
        model.train()
        for chosen in shuffled_batches(train, order):
            model(**rows_of(train, chosen)).loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if epoch % protocol.evaluate_every:
            continue
        found = evaluate(model, dev, task)
        if found > score:
            score, best, weights = found, epoch, [p.detach().clone() for p in parameters]
        elif epoch - best >= protocol.patience * protocol.evaluate_every:
            break
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return score, best


@torch.inference_mode()
def evaluate(model: nn.Module, batch: Batch, task: Task) -> float:
    model.eval()
    parts = batch["attention_mask"].sum(1).argsort().split(64)
    logits = torch.cat([model(**rows_of(batch, part)).logits for part in parts]).float().cpu()
    predictions = logits[:, 0] if task.labels == 1 else logits.argmax(-1)
    score = float(task.metric(batch["labels"][torch.cat(parts)].cpu().numpy(), predictions.numpy()))
    return 0.0 if math.isnan(score) else score  # Spearman of a constant


def shuffled_batches(batch: Batch, order: torch.Generator) -> list[Tensor]:
    """Rows in random batches, each of examples of about one length, which saves padding."""
    lengths = batch["attention_mask"].sum(1).cpu()
    batches = (lengths + 10 * torch.rand(len(lengths), generator=order)).argsort().split(BATCH_SIZE)
    return [batches[i] for i in torch.randperm(len(batches), generator=order)]


def rows_of(batch: Batch, chosen: Tensor) -> Batch:
    """The chosen rows of a batch, as wide as the longest of them."""
    length = int(batch["attention_mask"][chosen].sum(1).max())
    return {name: x[chosen, :length] if x.ndim == 2 else x[chosen] for name, x in batch.items()}


def encode(rows: list[Row], task: Task, tokenizer: Any) -> Batch:
    texts = [[row[name] for row in rows] for name in task.texts]
    batch = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in rows])
    if task.labels == 1:
        labels = labels / 2.5 - 1  # 0 to 5 becomes -1 to 1, nearer to a fresh head; ranks stay
    return {name: x.to(DEVICE) for name, x in {**batch, "labels": labels}.items()}


# The rows


def run_of(row: Row) -> Run:
    return Run(row["task"], int(row["k"]), row["method"], int(row["seed"]), float(row["lr"]))


# The report

Scores = dict[tuple[int, str, str], list[float]]  # K, task, method -> test scores in %, one a seed


def read_scores(rows: list[Row], rates: dict[tuple[int, str], float]) -> Scores:
    """The runs with the chosen learning rates."""
    scores = defaultdict(list)
    for row in rows:
        run = run_of(row)
        if run.lr == rates.get((run.k, run.method)):
            scores[run.k, run.task, run.method].append(100 * float(row["test"]))
    return dict(scores)


def ranks(scores: Scores, k: int, task: str) -> dict[str, float]:
    """Method -> rank of its mean, 1 for the best, ties sharing theirs; empty until all have run on as many seeds."""
    values = [scores.get((k, task, method), []) for method in RANKED]
    if len({len(found) for found in values}) > 1 or not values[0]:
        return {}
    return dict(zip(RANKED, rankdata([-mean(found) for found in values]).tolist(), strict=True))


def table(scores: Scores, rates: dict[tuple[int, str], float]) -> str:
    """A table a K, in Markdown: mean ± standard deviation over the seeds (rank); how often best, second and worst."""
    lines = []
    for k in sorted({k for k, _, _ in scores}):
        ranked = {task: found for task in TASKS if (found := ranks(scores, k, task))}
        lines += [
            f"### K = {k}\n",
            "| method | rate | " + " | ".join(TASKS) + " | mean | mean rank | best | second | worst |",
            "|---" + "|--:" * (len(TASKS) + 6) + "|",
        ]
        for method in METHODS:
            values = {task: scores.get((k, task, method), []) for task in TASKS}
            cells = [f"{rates[k, method]:g}" if (k, method) in rates else ""]
            cells += [cell(values[task], ranked.get(task, {}).get(method)) for task in TASKS]
            cells.append(f"{mean(map(mean, values.values())):.1f}" if all(values.values()) else "")
            cells += places(list(ranked.values()), method)
            lines.append(" | ".join([f"| {method}", *cells]) + " |")
        best = [min(SUBMODULES, key=ranked[task].__getitem__) if task in ranked else "" for task in TASKS]
        lines.append(" | ".join(["| best sub-module", "", *best]) + " |" * 6 + "\n")
    return "\n".join(lines)


def cell(values: list[float], rank: float | None) -> str:
    if not values:
        return ""
    centre = f"**{mean(values):.1f}**" if rank == 1 else f"{mean(values):.1f}"
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return centre + spread + (f" ({rank:g})" if rank else "")


def places(ranked: list[dict[str, float]], method: str) -> list[str]:
    """Mean rank of a method; on how many tasks it is best, second and worst."""
    if not ranked or method not in RANKED:
        return ["", "", "", ""]
    best = sum(found[method] == min(found.values()) for found in ranked)
    worst = sum(found[method] == max(found.values()) for found in ranked)
    second = sum(min(found.values()) < found[method] <= 2 for found in ranked)
    return [f"{mean(found[method] for found in ranked):.1f}", str(best), str(second), str(worst)]


def draw(scores: Scores, file: Path) -> None:
    """A panel a task, a row a method: a dot for each seed, a bar for their mean, a colour for each K."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = list(figure.subplots(2, 4, sharey=True).flat)
    for axes, task in zip(panels, TASKS, strict=True):
        axes.axhspan(RANKED.index("APL") - 0.5, RANKED.index("APL") + 0.5, color="0.93", zorder=0)
        for i, k in enumerate(sorted({k for k, _, _ in scores})):
            for place, method in enumerate(METHODS):
                values = scores.get((k, task, method), [])
                axes.scatter(values, [place] * len(values), s=14, color=f"C{i}", alpha=0.5, linewidths=0)
                if values:
                    axes.scatter(mean(values), place, s=120, marker="|", color=f"C{i}")
        axes.set_title(f"{task}, {TASKS[task].measure}", fontsize=10)
    panels[0].set_yticks(range(len(METHODS)), METHODS)
    panels[0].invert_yaxis()
    for i, k in enumerate(sorted({k for k, _, _ in scores})):
        panels[0].plot([], [], "|", color=f"C{i}", label=f"K = {k}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to each other
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main(*HfArgumentParser((Study, Protocol), description=__doc__).parse_args_into_dataclasses())
