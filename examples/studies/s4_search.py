"""S4's design spaces searched on MiniLM, stage by stage, and what was found against the usual methods at equal budget.

    pip install -e ".[studies,search]"
    HF_PEFT_EXT_DATA=folder python examples/studies/s4_search.py --models 2 --examples 64

The search stands in `search.db` in `--output`, the runs of the comparison in `comparison.csv`; started again, the
study goes on where it was, and a second process with the same options helps with the search. It writes the search's
report (`report.html`, `runs.csv`), `table.md` and `figure.png`. The paper samples 100 models for each constraint and
trains on all of eight tasks; here `--models`, `--tasks`, `--examples` and `--epochs` set the scale. By default the
tasks are those on which methods differ with this model and few examples (README.md beside this file).

The comparison has the protocol of unipelt_low_resource.py: the learning rate of each method is chosen on dev rows at
the first seed, the test rows are the task's own dev split, which the search never sees. Adapter, prefix and LoRA are
one group of layers with one strategy and the budget of S4; BitFit and full fine-tuning cost what they cost.
"""

import random
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import transformers
from matplotlib.figure import Figure
from peft import PeftConfig
from scipy.stats import false_discovery_control, ttest_rel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser

import unipelt_low_resource as low
from hf_peft_ext import BitFitConfig, S4Config
from hf_peft_ext.search import (
    DesignSpace,
    DesignSpaceSearch,
    RunArguments,
    SearchResult,
    SearchTask,
    share_trunk,
    write_report,
)
from runs import RESULTS

FOUND, PAPER = "S4, found", "S4, paper"
RATES = (2e-3, 5e-3, 1e-2)


@dataclass
class Study:
    """The scale, and where things are."""

    tasks: list[str] = field(default_factory=lambda: ["sst2", "stsb", "trec"], metadata={"choices": list(low.TASKS)})
    models: int = field(default=12, metadata={"help": "Models sampled for each constraint."})
    examples: int = field(default=500, metadata={"help": "Rows that a sampled model trains on, of each task."})
    score_rows: int = field(default=200, metadata={"help": "Other rows of train that it is scored on."})
    epochs: int = field(default=3, metadata={"help": "Passes over them."})
    lr: float = field(default=5e-3, metadata={"help": "Learning rate of all sampled models."})
    groups: int = field(default=3, metadata={"help": "Groups of layers; four of MiniLM's six allow two patterns."})
    budget: float = field(default=0.005, metadata={"help": "Share of the base model's parameters."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Of the comparison."})
    k: int = field(default=100, metadata={"help": "Training rows of a task in the comparison."})
    final_epochs: int = field(default=8, metadata={"help": "Passes over them."})
    test_rows: int = field(default=400, metadata={"help": "Most test rows of a task."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})
    model: str = field(default=low.MINILM, metadata={"help": "A name on the Hub or a folder; by default MiniLM-L6."})
    data: Path = field(default=low.Study().data, metadata={"help": "Folder of TASK.train.jsonl and TASK.dev.jsonl."})
    output: Path = field(default=RESULTS / "s4", metadata={"help": "Folder for what is written."})
    search_only: bool = field(default=False, metadata={"help": "Leave the comparison out."})


def main(study: Study) -> None:
    study.output.mkdir(parents=True, exist_ok=True)
    result = search(study).search()
    write_report(result, study.output)
    for decision in result.decisions:
        tie = " (a tie)" if decision.tie else ""
        low.console.print(f"{decision.stage}: {decision.winner}, {decision.means[decision.winner]:.3f}{tie}")
    if study.search_only:
        return
    scores, rates = comparison(study, result)
    (study.output / "table.md").write_text(table(scores, rates, study.tasks), encoding="utf-8")
    draw(scores, study.tasks, study.output / "figure.png")
    low.console.print(f"Written: {study.output}, report.html, table.md and figure.png")


# The search


def search(study: Study) -> DesignSpaceSearch:
    source = low.find_model(study.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    transformers.set_seed(0)  # the heads
    models = share_trunk(
        {
            task: AutoModelForSequenceClassification.from_pretrained(source, num_labels=low.TASKS[task].labels)
            for task in study.tasks
        }
    )
    return DesignSpaceSearch(
        {task: search_task(study, task, model.to(low.DEVICE), tokenizer) for task, model in models.items()},
        DesignSpace.of(models[study.tasks[0]], study.budget, study.groups, task_type="SEQ_CLS"),
        RunArguments(num_train_epochs=study.epochs, learning_rate=study.lr, bf16=study.bf16),
        storage=f"sqlite:///{study.output / 'search.db'}",
        n_models=study.models,
    )


def search_task(study: Study, name: str, model: Any, tokenizer: Any) -> SearchTask:
    """Rows drawn from train, and the task's measure."""
    task = low.TASKS[name]
    rows = random.Random("search").sample(low.read(study.data, name, "train"), study.examples + study.score_rows)
    encoded = [tokenizer(*(row[text] for text in task.texts), truncation=True, max_length=low.MAX_LENGTH)
               | {"labels": row["label"] / 2.5 - 1 if task.labels == 1 else row["label"]} for row in rows]  # fmt: skip

    def measure(found: Any) -> float:
        predictions = found.predictions[:, 0] if task.labels == 1 else found.predictions.argmax(-1)
        score = float(task.metric(found.label_ids, predictions))
        return 0.0 if score != score else score  # Spearman of a constant

    collate = DataCollatorWithPadding(tokenizer)
    return SearchTask(model, encoded[: study.examples], encoded[study.examples :], measure, collate)


# The comparison


def methods(study: Study, found: PeftConfig) -> dict[str, low.Method]:
    def one(strategy: str) -> PeftConfig:
        return S4Config(strategies=[[strategy]], budget=study.budget, **low.SEQ_CLS)

    return {
        FOUND: low.Method(found, RATES),
        PAPER: low.Method(S4Config(budget=study.budget, **low.SEQ_CLS), RATES),
        "adapter": low.Method(one("adapter"), RATES),
        "prefix": low.Method(one("prefix"), low.METHODS["prefix"].rates),
        "BitFit": low.Method(BitFitConfig(**low.SEQ_CLS), low.METHODS["BitFit"].rates),
        "LoRA": low.Method(one("lora"), RATES),
        "full": low.METHODS["full"],
    }


def comparison(study: Study, result: SearchResult) -> tuple[low.Scores, dict[tuple[int, str], float]]:
    """The runs that are missing, as those of the low-resource study; their scores and the chosen rates."""
    compared = methods(study, result.config)
    low.METHODS.update(compared)
    protocol = low.Protocol(
        model=study.model, epochs=study.final_epochs, test_rows=study.test_rows, tune_on=study.tasks, bf16=study.bf16
    )
    low.check_protocol(study.output / "protocol.json", asdict(protocol))
    wanted = low.Study(tasks=study.tasks, methods=list(compared), seeds=study.seeds, k=[study.k], data=study.data)
    runs = study.output / "comparison.csv"
    for run in low.missing(wanted, protocol, runs):
        start = time.perf_counter()
        row = run._asdict() | low.train_and_test(run, study.data, protocol)
        low.append(runs, row | {"seconds": round(time.perf_counter() - start, 1)})
        low.console.print("  ".join(f"{name} {value}" for name, value in row.items()))
    rows = [row for row in low.read_rows(runs) if row["method"] in compared]
    rates = low.chosen_rates(rows, study.tasks)
    return low.read_scores(rows, rates), rates


def seed_means(scores: low.Scores, method: str, tasks: list[str]) -> list[float]:
    """The mean over the tasks, for each seed."""
    found = {task: values for (_, task, name), values in scores.items() if name == method}
    return [mean(values) for values in zip(*(found[task] for task in tasks), strict=True)]


def paired_test(first: list[float], second: list[float]) -> float | None:
    """The p-value of a paired t-test; None where it has none: one pair, or pairs that all differ by the same."""
    if len({round(a - b, 9) for a, b in zip(first, second, strict=True)}) < 2:
        return None
    return float(ttest_rel(first, second).pvalue)


def table(scores: low.Scores, rates: dict[tuple[int, str], float], tasks: list[str]) -> str:
    """Mean ± standard deviation over the seeds; p of a paired t-test of seed means against the architecture found,
    as it is and corrected for the number of tests (Benjamini and Hochberg).
    """
    names = list(dict.fromkeys(name for _, _, name in scores))
    means = {name: seed_means(scores, name, tasks) for name in names}
    p = {name: value for name in names if (value := paired_test(means[FOUND], means[name])) is not None}
    corrected = dict(zip(p, false_discovery_control([*p.values()]), strict=True)) if p else {}
    chosen = {name: rate for (_, name), rate in rates.items()}
    lines = [
        f"| method | rate | {' | '.join(tasks)} | mean | p | p, corrected |",
        "|---" + "|--:" * (len(tasks) + 4) + "|",
    ]
    for name in names:
        values = {task: found for (_, task, method), found in scores.items() if method == name}
        cells = [name, f"{chosen[name]:g}", *(low.cell(values[task], None) for task in tasks)]
        cells += [low.cell(means[name], None), f"{p[name]:.3f}" if name in p else ""]
        lines.append(" | ".join(["| " + cells[0], *cells[1:], f"{corrected[name]:.3f}" if name in p else ""]) + " |")
    return "\n".join(lines) + "\n"


def draw(scores: low.Scores, tasks: list[str], file: Path) -> None:
    """A panel a task and one for their mean; a dot for each seed, a bar for the mean of a method."""
    names = list(dict.fromkeys(name for _, _, name in scores))
    figure = Figure(figsize=(3 * (len(tasks) + 1), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks) + 1, sharey=True)
    for axes, task in zip(panels, [*tasks, "mean"], strict=True):
        for place, name in enumerate(names):
            values = seed_means(scores, name, tasks if task == "mean" else [task])
            color = "C0" if name == FOUND else "0.35"
            axes.scatter(values, [place] * len(values), s=14, color=color, alpha=0.5, linewidths=0)
            axes.scatter(mean(values), place, s=120, marker="|", color=color)
        axes.set_title(task if task == "mean" else f"{task}, {low.TASKS[task].measure}", fontsize=10)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to each other
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main(*HfArgumentParser(Study, description=__doc__).parse_args_into_dataclasses())  # pyright: ignore[reportArgumentType]
