"""Which method when: every method at an equal number of parameters on real tasks, through `compare`.

    tune        SST-2, AG News, and the training messages of examples/data: each method chooses among three learning
                rates; then seeds at the best one
    test        TREC, QNLI and STS-B: the rates of `compare`'s table, which `tune` fixed; nothing is chosen
    beginnings  TREC: UniPELT, MAM, S4, prefix and Pfeiffer as they begin by default and as in their papers
    ablation    TREC: UniPELT without gates, without one of its sub-layers, and with other gates
    sizes       TREC: Pfeiffer's adapter by width, prefixes by length, LoRA by alpha at rank 8

Each cell draws a pool of rows once. Each seed trains on other K rows of it and is scored on the 200 that are left.
A cell that was interrupted continues, and several processes share one. The data are those of HF_PEFT_EXT_DATA.
With `--head mean` the classifier reads the mean of the last hidden states, for which MiniLM was pretrained.

    python examples/studies/which_method.py --stage tune
    python examples/studies/which_method.py --stage test --k 100 --seeds 5
    python examples/studies/which_method.py --stage table
"""

import json
import os
import random
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml
from rich.console import Console
from scipy.stats import ttest_1samp

from hf_peft_ext.compare.methods import COMPARED_METHODS, Method
from hf_peft_ext.compare.runs import RATES
from hf_peft_ext.search.trial_queue import Queue
from hf_peft_ext.trainers import compare
from runs import MINILM, RESULTS, Row, find_model, parse, read, read_rows

DEV = 200
MESSAGES = Path(__file__).parents[1] / "data" / "support_messages.csv"
NOTE = (
    "MiniLM-L6; scores in % (accuracy; Pearson's correlation on STS-B) on rows that the run did not train on, mean ± "
    "standard deviation over seeds. The difference from LoRA is over all tasks and seeds, with its 95 % interval and "
    "p of a paired t-test, uncorrected."
)
METHODS = ["lora", "unipelt", "mam", "s4", "pfeiffer", "prefix", "ia3", "bitfit", "full"]
STAGES = {
    "tune": (["sst2", "ag_news", "messages"], METHODS, [1 / 3, 1.0, 3.0]),
    "test": (["trec", "qnli", "stsb"], METHODS, [1.0]),
}
TEXTS = {"qnli": ["question", "sentence"], "stsb": ["sentence1", "sentence2"]}

UNIPELT = COMPARED_METHODS["unipelt"]
PAPERS = {
    f"{name}, paper's beginning": replace(
        COMPARED_METHODS[name],
        title=f"{COMPARED_METHODS[name].title}, paper's beginning",
        config={**COMPARED_METHODS[name].config, "init": "paper"},
    )
    for name in ("unipelt", "mam", "s4", "prefix", "pfeiffer")
}


def without(*dropped: str) -> Method:
    """UniPELT without some of its sub-layers."""
    methods = [name for name in ("adapter", "prefix", "lora") if name not in dropped]
    sizes = {"adapter": "bottleneck_size", "prefix": "num_virtual_tokens", "lora": "r"}
    kept = {sizes[name]: UNIPELT.sizes[sizes[name]] for name in methods}
    follows = UNIPELT.follows if "lora" in methods else {}
    title = f"UniPELT without {' and '.join(dropped)}"
    return replace(UNIPELT, title=title, config={**UNIPELT.config, "methods": methods}, sizes=kept, follows=follows)


ABLATIONS = {
    "unipelt, no gates": replace(UNIPELT, title="UniPELT, no gates", config={**UNIPELT.config, "gated": False}),
    "unipelt, token gates": replace(
        UNIPELT, title="UniPELT, token gates", config={**UNIPELT.config, "gate_pooling": "token"}
    ),
    "unipelt, gates half open": replace(
        UNIPELT, title="UniPELT, gates half open", config={**UNIPELT.config, "gate_init": 0.0}
    ),
    "unipelt, no adapter": without("adapter"),
    "unipelt, no prefix": without("prefix"),
    "unipelt, no lora": without("lora"),
}


def fixed(name: str, title: str, **fields: Any) -> Method:
    """A method at a size that no budget changes."""
    method = COMPARED_METHODS[name]
    return replace(method, title=title, config={**method.config, **fields}, sizes={}, follows={})


SIZES = {
    **{f"pfeiffer {r}": fixed("pfeiffer", f"Pfeiffer adapter, width {r}", r=r) for r in (6, 12, 24, 48, 96, 192)},
    **{
        f"prefix {n}": fixed("prefix", f"prefix in attention, {n} vectors", num_virtual_tokens=n)
        for n in (2, 5, 10, 20, 40)
    },
    **{
        f"lora alpha {alpha}": fixed("lora", f"LoRA, rank 8, alpha {alpha}", r=8, lora_alpha=alpha)
        for alpha in (2, 4, 8, 16, 32, 64)
    },
}
STAGES["beginnings"] = (["trec"], ["lora", "unipelt", "mam", "s4", "prefix", "pfeiffer", *PAPERS], [1.0])
STAGES["ablation"] = (["trec"], ["lora", "unipelt", *ABLATIONS], [1.0])
STAGES["sizes"] = (["trec"], ["lora", *SIZES], [1.0])


@dataclass
class Arguments:
    """Options of the command."""

    stage: str = field(metadata={"help": f"{', '.join(STAGES)}, or table."})
    k: int = field(default=100, metadata={"help": "Training rows of each run."})
    seeds: int = field(default=5, metadata={"help": "Runs of each method at its rate."})
    budget: str = field(default="0.5%", metadata={"help": "Trained parameters of each method."})
    epochs: int = field(default=8, metadata={"help": "Epochs of each run."})
    head: str = field(default="first", metadata={"help": "What the classifier reads: first (token), or mean."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks in place of the stage's own."})
    methods: list[str] | None = field(default=None, metadata={"help": "Methods in place of the stage's own."})
    rates: list[float] | None = field(default=None, metadata={"help": "Factors on the usual rates."})
    data: Path = field(
        default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")), metadata={"help": "Folder of the data."}
    )
    output: Path = field(
        default=RESULTS / "which_method", metadata={"help": 'Folder of the results; "mean" inside for that head.'}
    )


def messages() -> list[Row]:
    """The training rows of the support messages."""
    rows = [row for row in read_rows(MESSAGES) if row["split"] == "train"]
    return [{"text": row["text"], "label": row["intent"]} for row in rows]


def pool(args: Arguments, task: str) -> list[dict[str, Any]]:
    """The K + 200 rows of a task, drawn once; of classes as equally as they allow."""
    rows = messages() if task == "messages" else list(read(args.data, task, "train"))
    random.Random(0).shuffle(rows)
    if task == "stsb":
        return rows[: args.k + DEV]
    classes: dict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        classes[row["label"]].append(row)
    drawn: list[Any] = []
    while len(drawn) < args.k + DEV:
        for label in sorted(classes):
            if classes[label] and len(drawn) < args.k + DEV:
                drawn.append(classes[label].pop())
    return drawn


def recipe(args: Arguments, task: str, folder: Path) -> Path:
    """Write the rows and the recipe of a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = TEXTS.get(task, ["text"])
    rows, path = folder / f"{task}.jsonl", folder / "recipe.yaml"
    kept = [{**{c: row[c] for c in columns}, "label": row["label"]} for row in pool(args, task)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    training: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "train_sampling_strategy": "group_by_length",
        "seed": 0,
        "use_cpu": not torch.cuda.is_available(),
    }
    sections = {
        "model": {"model_name_or_path": find_model(MINILM), "pooling": "mean" if args.head == "mean" else None},
        # fields of this section would count for every method of its type; BitFit has none
        "peft": {"peft_type": "BITFIT", "task_type": "SEQ_CLS"},
        "data": {
            "data_files": str(rows),
            "text_column": columns if len(columns) > 1 else columns[0],
            "label_column": "label",
            "max_length": 64,
            **({"problem_type": "regression"} if task == "stsb" else {}),
        },
        "training": training,
    }
    path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return path


def run(args: Arguments, stage: str) -> None:
    tasks, methods, rates = STAGES[stage]
    COMPARED_METHODS.update(PAPERS | ABLATIONS | SIZES)
    for task in args.tasks or tasks:
        folder = args.output / f"{stage}-{task}-{args.k}"
        result = compare(
            recipe(args, task, folder),
            methods=args.methods or methods,
            budget=args.budget,
            seeds=args.seeds,
            rates=args.rates or rates,
            dev_share=DEV / (args.k + DEV),
            output_dir=folder,
            train_winner=False,
            progress=False,
        )
        Console().print(f"{task}: {result.recommendation}")


def cells_of(output: Path, stage: str) -> dict[str, dict[str, dict[str, float]]]:
    """Task -> title of a method -> seed -> score in %."""
    paths = sorted(output.glob(f"{stage}-*/compare.json"))
    results = {path.parent.name.removeprefix(f"{stage}-"): json.loads(path.read_text("utf-8")) for path in paths}
    return {
        task: {m["title"]: {seed: 100 * score for seed, score in m["scores"].items()} for m in result["methods"]}
        for task, result in results.items()
    }


def difference(cells: dict[str, dict[str, dict[str, float]]], title: str, reference: str) -> str:
    """Mean difference over all tasks and seeds with its 95 % interval, and p of the paired t-test, uncorrected."""
    pairs = [
        score - methods[reference][seed]
        for methods in cells.values()
        if title in methods
        for seed, score in methods[title].items()
        if seed in methods[reference]
    ]
    if len(pairs) < 2 or title == reference:
        return " | "
    test: Any = ttest_1samp(pairs, 0)
    low, high = test.confidence_interval()
    return f"{fmean(pairs):+.1f} [{low:+.1f}, {high:+.1f}] | {test.pvalue:.2f}"


def table(args: Arguments, stage: str) -> str:
    """The table of a stage."""
    return table_of(stage, cells_of(args.output, stage), "LoRA")


def table_of(title: str, cells: dict[str, dict[str, dict[str, float]]], reference: str) -> str:
    """Mean and standard deviation of each method on each task, and its difference from the reference."""
    if not cells:
        return ""
    titles = list(dict.fromkeys(method for methods in cells.values() for method in methods))
    rows = [
        f"| method | {' | '.join(cells)} | mean | against {reference} | p |",
        f"|---|{'--:|' * len(cells)}--:|--:|--:|",
    ]
    scored = {t: [fmean(c[t].values()) for c in cells.values() if c.get(t)] for t in titles}
    means = {t: fmean(scores) for t, scores in scored.items() if scores}
    for method in sorted(means, key=lambda method: -means[method]):
        scores = [methods.get(method) or {} for methods in cells.values()]
        texts = [f"{fmean(s.values()):.1f} ± {stdev(s.values()):.1f}" if len(s) > 1 else "" for s in scores]
        against = difference(cells, method, reference)
        rows.append(f"| {method} | {' | '.join(texts)} | {means[method]:.1f} | {against} |")
    return f"## {title}\n\n" + "\n".join(rows) + "\n"


def rates(output: Path) -> str:
    """The scores of each learning rate on the tuning tasks, also of a comparison that has not ended."""
    rows = ["| task | method | learning rate: score |", "|---|---|---|"]
    for path in sorted(output.glob("tune-*/compare.db")):
        task, tried = path.parent.name.removeprefix("tune-"), defaultdict[str, dict[float, str]](dict)
        for record in Queue(f"sqlite:///{path}", "compare").records(RATES):
            if "dev" in record.scores:
                share = "" if record.state == "done" else " (stopped)"
                score = f"{100 * record.scores['dev']:.1f}{share}"
                tried[record.run.constraint][record.run.config["learning_rate"]] = score
        for name, scores in tried.items():
            text = ", ".join(f"{rate:g}: {score}" for rate, score in sorted(scores.items()))
            rows.append(f"| {task} | {COMPARED_METHODS[name].title} | {text} |")
    return "## Learning rates\n\n" + "\n".join(rows) + "\n"


def report(args: Arguments) -> None:
    """Write and print table.md."""
    texts = [table(args, stage) for stage in STAGES]
    text = "\n".join([f"# Which method when\n\n{NOTE}\n", *filter(None, texts), rates(args.output)])
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    args = parse(Arguments, [*STAGES, "table"])
    if args.head not in ("first", "mean"):
        raise SystemExit(f"`head` (={args.head!r}) must be one of: first, mean.")
    if args.head == "mean":
        args.output /= "mean"  # its cells and its table
    report(args) if args.stage == "table" else run(args, args.stage)


if __name__ == "__main__":
    main()
