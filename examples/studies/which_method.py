"""Which method when: every method at an equal number of parameters on real tasks, through `compare`.

    tune        SST-2 and AG News: each method chooses among three learning rates; then seeds at the best one
    test        TREC, QNLI and STS-B: the rates of `compare`'s table, which `tune` fixed; nothing is chosen
    beginnings  TREC: UniPELT, MAM, S4, prefix and Pfeiffer as they begin by default and as in their papers
    ablation    TREC: UniPELT without gates, without one of its sub-layers, and with other gates

Each cell draws a pool of rows once. Each seed trains on other K rows of it and is scored on the 200 that are left.
A cell that was interrupted continues, and several processes share one. The data are those of HF_PEFT_EXT_DATA.

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
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console
from transformers import HfArgumentParser

from hf_peft_ext.compare.methods import COMPARED_METHODS, Method
from hf_peft_ext.trainers import compare
from runs import MINILM, RESULTS, find_model, read

DEV = 200
METHODS = ["lora", "unipelt", "mam", "s4", "pfeiffer", "prefix", "ia3", "bitfit", "full"]
STAGES = {
    "tune": (["sst2", "ag_news"], METHODS, [1 / 3, 1.0, 3.0]),
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
STAGES["beginnings"] = (["trec"], ["lora", "unipelt", "mam", "s4", "prefix", "pfeiffer", *PAPERS], [1.0])
STAGES["ablation"] = (["trec"], ["lora", "unipelt", *ABLATIONS], [1.0])


@dataclass
class Arguments:
    """Options of the command."""

    stage: str = field(metadata={"help": f"{', '.join(STAGES)}, or table."})
    k: int = field(default=100, metadata={"help": "Training rows of each run."})
    seeds: int = field(default=5, metadata={"help": "Runs of each method at its rate."})
    budget: str = field(default="0.5%", metadata={"help": "Trained parameters of each method."})
    epochs: int = field(default=8, metadata={"help": "Epochs of each run."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks in place of the stage's own."})
    methods: list[str] | None = field(default=None, metadata={"help": "Methods in place of the stage's own."})
    data: Path = field(
        default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")), metadata={"help": "Folder of the data."}
    )
    output: Path = field(default=RESULTS / "which_method", metadata={"help": "Folder of the results."})


def pool(args: Arguments, task: str) -> list[dict[str, Any]]:
    """The K + 200 rows of a task, drawn once; of classes as equally as they allow."""
    rows = list(read(args.data, task, "train"))
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
        "use_cpu": True,
    }
    sections = {
        "model": {"model_name_or_path": find_model(MINILM)},
        "peft": {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16},
        "data": {
            "data_files": str(rows),
            "text_column": columns if len(columns) > 1 else columns[0],
            "label_column": "label",
            "max_length": 64,
        },
        "training": training,
    }
    path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return path


def run(args: Arguments, stage: str) -> None:
    tasks, methods, rates = STAGES[stage]
    COMPARED_METHODS.update(PAPERS | ABLATIONS)
    for task in args.tasks or tasks:
        folder = args.output / f"{stage}-{task}-{args.k}"
        result = compare(
            recipe(args, task, folder),
            methods=args.methods or methods,
            budget=args.budget,
            seeds=args.seeds,
            rates=rates,
            dev_share=DEV / (args.k + DEV),
            output_dir=folder,
            train_winner=False,
            progress=False,
        )
        Console().print(f"{task}: {result.recommendation}")


def table(args: Arguments) -> None:
    """The means of all cells, and the mean difference of each method from LoRA."""
    console = Console(width=200)
    for path in sorted(args.output.glob("*/compare.json")):
        result = json.loads(path.read_text("utf-8"))
        console.print(path.parent.name, result["recommendation"])
        for m in sorted(result["methods"], key=lambda m: -(m["mean"] or 0)):
            scores = " ".join(f"{100 * s:.1f}" for s in m["scores"].values())
            rates = " ".join(f"{rate}: {100 * s:.1f}" for rate, s in m["rates"].items())
            mean = fmean(m["scores"].values()) if m["scores"] else float("nan")
            console.print(f"  {m['title']:34} {100 * mean:5.1f}  [{scores}]  {m['learning_rate']:.3g}  ({rates})")


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # pyright: ignore[reportArgumentType]
    if args.stage not in (*STAGES, "table"):
        raise SystemExit(f"`stage` (={args.stage!r}) must be one of: {', '.join(STAGES)}, table.")
    table(args) if args.stage == "table" else run(args, args.stage)


if __name__ == "__main__":
    main()
