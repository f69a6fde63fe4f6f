"""How alike are the modules that a small and a large model learn from the same task? The paper says up to 75 %.

    pip install -e ".[studies]"
    HF_PEFT_EXT_DATA=folder python examples/studies/plug_in.py --tasks sst2 trec ag_news --conditions small peft
    HF_PEFT_EXT_DATA=folder python examples/studies/module_similarity.py --trained examples/studies/plug_in_results

Compares the modules that plug_in.py left in its `--output`, layer by layer, on texts of the task's dev split. A number
of this kind says something only beside others, so a module of some task and seed has six comparisons:

    plugged            of the small model, with itself in the large model: the most that two models can have in common
    pair               of the small model, with what the large model learnt
    pair, other seed   the same, with what it learnt with another seed
    pair, other task   the same, with what it learnt of another task: what needs no common task
    seeds              of the large model, with what it learnt with another seed: the most to expect of two trainings
    tasks              the same, with what it learnt of another task

The other seed and the other task are the next in the list. A seed draws the rows to learn from, their order, and how a
module begins; modules of one seed begin with the same numbers where they have one shape, and so "other task" is of
another seed too.

A comparison becomes rows of `runs.csv` in `--output`, one a layer, when it is done; one whose modules are not there is
left out. Started again, the study goes on with those that are missing; the modules of another pair of models, by
another `--trained`, add their own.
"""

import copy
import itertools
import json
import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import transformers
from matplotlib.figure import Figure
from peft import PeftModel
from transformers import HfArgumentParser

from hf_peft_ext.transfer import Projections, merge_projections, module_similarity, plug
from hf_peft_ext.transfer.run.task import task_for
from hf_peft_ext.transfer.similarity import PAPER_COSINE
from plug_in import Study as PlugInStudy
from plug_in_conditions import MODULES
from plug_in_models import Protocol, as_row, console, load, small_of
from runs import RESULTS, Row, append, read, read_rows


class Comparison(NamedTuple):
    """What gave the first module and the second, and whether the second is of another seed and of another task."""

    first: str
    second: str
    other_seed: bool = False
    other_task: bool = False


COMPARISONS = {
    "plugged": Comparison("small", "plugged"),
    "pair": Comparison("small", "peft"),
    "pair, other seed": Comparison("small", "peft", other_seed=True),
    "pair, other task": Comparison("small", "peft", other_seed=True, other_task=True),
    "seeds": Comparison("peft", "peft", other_seed=True),
    "tasks": Comparison("peft", "peft", other_seed=True, other_task=True),
}
MEASURES = {"cosine": "cosine", "cka": "CKA"}


@dataclass
class Study:
    """Which modules, and where things are."""

    trained: Path = field(metadata={"help": "The --output of plug_in.py; it is only read."})
    tasks: list[str] = field(default_factory=lambda: ["sst2", "trec", "ag_news"], metadata={"help": "At least two."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "At least two."})
    module: str = field(default="lora", metadata={"choices": list(MODULES)})
    texts: int = field(default=64, metadata={"help": "Of each task."})
    draws: int = field(default=2, metadata={"help": "Of untrained modules, for each comparison."})
    data: Path = field(default=PlugInStudy().data, metadata={"help": "As in plug_in.py."})
    output: Path = field(default=RESULTS / "module_similarity", metadata={"help": "Folder for what is written."})


def main(study: Study) -> None:
    for name, values in (("tasks", study.tasks), ("seeds", study.seeds)):
        if len(set(values)) < 2:
            raise SystemExit(f"`{name}` (={values}) must be at least two, to compare one with another.")
    study.output.mkdir(parents=True, exist_ok=True)
    file = study.output / "runs.csv"
    models = Models(study)
    done = {(row["models"], row["task"], row["seed"], row["comparison"]) for row in read_rows(file)}
    for task, seed, name in itertools.product(study.tasks, study.seeds, COMPARISONS):
        if (models.pair, task, str(seed), name) in done or (pair := models.compared(name, task, seed)) is None:
            continue
        found = module_similarity(*pair, models.batches(task), draws=study.draws)
        for layer in found.layers:
            row = {"models": models.pair, "task": task, "seed": seed, "comparison": name, "rows": found.rows}
            row |= {"layer": layer.layer_b, "of the first": layer.layer_a}
            for measure in MEASURES:
                row[measure] = round(getattr(layer, measure), 4)
                row[f"untrained {measure}"] = round(fmean(getattr(layer, f"chance_{measure}")), 4)
            append(file, row)
        console.print(f"{task}, seed {seed}, {name}: cosine {found.cosine:.2f}, CKA {found.cka:.2f}")
    rows = read_rows(file)
    (study.output / "table.md").write_text(table(rows), encoding="utf-8")
    draw(rows, study.output / "figure.png")
    console.print(f"Written: {file}, table.md and figure.png")


class Models:
    """The small and the large model that modules were trained on, and those modules."""

    def __init__(self, study: Study):
        self.study, self.folder = study, study.trained / "modules"
        given = json.loads((study.trained / "protocol.json").read_text(encoding="utf-8"))
        protocol = Protocol(**given)
        self.pair = protocol.pair
        self.large, self.tokenizer = load(protocol, labels=2)  # heads are not compared: any will do
        self.small, self.index = small_of(self.large, self.tokenizer, study.data, study.trained, protocol)

    def compared(self, name: str, task: str, seed: int) -> tuple[PeftModel, PeftModel] | None:
        """The two models of a comparison, unless a module of theirs is not there."""
        one = COMPARISONS[name]
        first = self.adapted(one.first, task, seed)
        if one.second == "plugged":
            slices = Projections("slice", index=self.index)
            return first and (first, merge_projections(plug(first, copy.deepcopy(self.large), slices)))
        task = following(self.study.tasks, task) if one.other_task else task
        seed = following(self.study.seeds, seed) if one.other_seed else seed
        second = self.adapted(one.second, task, seed)
        return first and second and (first, second)

    def adapted(self, condition: str, task: str, seed: int) -> PeftModel | None:
        path = self.folder / f"{task}-{seed}" / f"{condition}-{self.study.module}"
        base = self.small if condition == "small" else self.large
        return PeftModel.from_pretrained(copy.deepcopy(base), path) if path.exists() else None

    def batches(self, task: str) -> list[dict[str, Any]]:
        """Texts of a task's dev split, without their labels: the head need not have as many."""
        drawn = read(self.study.data, task, "dev")
        drawn = random.Random(0).sample(drawn, min(self.study.texts, len(drawn)))
        rows = [as_row(self.pair, task, row, self.tokenizer) for row in drawn]
        of = task_for(self.tokenizer, rows)
        made = [of.batch(self.large, rows[i : i + 16]) for i in range(0, len(rows), 16)]
        return [{name: value for name, value in batch.items() if name != "labels"} for batch in made]


def following(values: list[Any], value: Any) -> Any:
    """The next in the list; after the last, the first."""
    return values[(values.index(value) + 1) % len(values)]


# Report


def by_run(rows: list[Row], column: str) -> list[float]:
    """The mean over the layers of each run."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        found.setdefault((row["task"], row["seed"]), []).append(float(row[column]))
    return [fmean(values) for values in found.values()]


def table(rows: list[Row]) -> str:
    """Cosine / CKA, means over layers ± standard deviation over runs: by task, all tasks, and of untrained modules."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [
        f"| models | comparison | {' | '.join(tasks)} | all | untrained |",
        "|---|---" + "|--:" * (len(tasks) + 2) + "|",
    ]
    for pair, name in itertools.product(dict.fromkeys(row["models"] for row in rows), COMPARISONS):
        found = [row for row in rows if (row["models"], row["comparison"]) == (pair, name)]
        groups = [([row for row in found if row["task"] == task], "") for task in tasks]
        groups += [(found, ""), (found, "untrained ")]
        cells = [" / ".join(spread(by_run(group, kind + measure)) for measure in MEASURES) for group, kind in groups]
        lines.append(" | ".join([f"| {pair}", name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def draw(rows: list[Row], file: Path) -> None:
    """By layer, the mean over tasks and seeds: a line a comparison, and dotted what untrained modules reach in it."""
    pairs = list(dict.fromkeys(row["models"] for row in rows))
    figure = Figure(figsize=(9, 3.2 * len(pairs)), layout="constrained")
    panels = figure.subplots(len(pairs), len(MEASURES), squeeze=False, sharey=True)
    for axes, (pair, measure) in zip(panels.flat, itertools.product(pairs, MEASURES), strict=True):
        for i, name in enumerate(COMPARISONS):
            found = [row for row in rows if (row["models"], row["comparison"]) == (pair, name)]
            layers = sorted({int(row["layer"]) for row in found})
            for kind, style in (("", {"marker": "o", "markersize": 3, "label": name}), ("untrained ", {"ls": ":"})):
                heights = [fmean(float(row[kind + measure]) for row in found if int(row["layer"]) == layer)
                           for layer in layers]  # fmt: skip
                axes.plot(layers, heights, color=f"C{i}", linewidth=1.2, **style)
        axes.axhline(PAPER_COSINE, color="0.6", linewidth=0.8, linestyle="--", label="the paper's 75 %")
        axes.set_title(f"{pair}: {MEASURES[measure]}", fontsize=10)
        axes.set_xlabel("layer of the large model")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to each other
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main(*HfArgumentParser(Study, description=__doc__).parse_args_into_dataclasses())  # pyright: ignore[reportArgumentType]
