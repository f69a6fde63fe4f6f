"""Plug-in transfer on small pairs: does an adapter of the small model help the large one, and what does each way cost?

    pip install -e ".[studies]"
    HF_PEFT_EXT_DATA=folder python examples/studies/plug_in.py --tasks sst2 trec --seeds 0 1 2
    HF_PEFT_EXT_DATA=folder python examples/studies/plug_in.py --pair smollm2 --tasks sst2 comve copa

Pairs: "minilm" is MiniLM-L6 and three of its layers. "smollm2" is SmolLM2-135M and 24 of its 30 layers at three
quarters of the width, healed on the data folder's text, which is done once for an `--output`. Language models rank
the answers of the first prompt template of a task. MiniLM has a classification head. In every condition, also that of
the untouched model, it is a logistic regression on the frozen model's features of the training rows. Training does not
change the head, so that a gain is the adapter's.

Conditions:

    untouched   the large model (with its head)
    small       the small model with an adapter
    unbridged   that adapter, plugged into the large model, untrained
    paper       the same, trained in the paper's bridge
    bridge      the bridge of "paper" itself
    delta       the same, trained in the delta bridge
    refined     delta, with a scale for each layer refined by MeZO
    distilled   as delta, also trained on rows without answers, towards the small model's probabilities
    folded      as delta, with W_plug merged in first, so that the adapter itself is trained at full width (no
                difference if both models have the same channels and W_plug is a slice)
    fresh       a new adapter on the large model, trained in the delta bridge; shows what the small model was good for
    mezo        a new adapter on the large model, trained by forward passes alone
    peft        a new adapter on the large model, trained by its gradients
    full        full fine-tuning

Each run becomes a row of `runs.csv` in `--output` when it is done; a study that is started again continues with the
missing runs. Test rows are the task's dev split, which no choice uses. `scale` is the factor of the adapter that is
best on dev rows drawn from train (0 is the untouched model), and `safe` the accuracy at this scale. `seconds` is the
process time of a condition, earlier stages included; scoring and healing the small model are not counted.

plug_in_models.py has the models and rows, plug_in_conditions.py the conditions; plug_in_table.py and
plug_in_figures.py have the report.
"""

import itertools
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import transformers
from transformers import HfArgumentParser

from plug_in_conditions import BRIDGED, CONDITIONS, MODULES, PLUGGED, Cell, Run
from plug_in_figures import draw, draw_variants
from plug_in_models import Protocol, console
from plug_in_table import table
from runs import RESULTS, append, check_protocol, read_rows


@dataclass
class Study:
    """The runs to make, and the folders."""

    tasks: list[str] = field(default_factory=lambda: ["sst2", "trec"], metadata={"help": "Names of data files."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A draw of rows and an order each."})
    conditions: list[str] = field(default_factory=lambda: list(CONDITIONS), metadata={"choices": list(CONDITIONS)})
    modules: list[str] = field(default_factory=lambda: ["lora"], metadata={"choices": list(MODULES)})
    init: list[str] = field(
        default_factory=lambda: ["slice"],
        metadata={"choices": ["orthogonal", "slice", "least_squares"], "help": "How W_plug begins."},
    )
    r: list[int] = field(default_factory=lambda: [16], metadata={"help": "The factor that the bridge is smaller by."})
    reading: list[str] = field(default_factory=lambda: ["parameters"], metadata={"choices": ["parameters", "width"]})
    importance: list[str] = field(
        default_factory=lambda: ["activation"],
        metadata={"choices": ["activation", "fisher", "magnitude"], "help": "What chooses the bridge's channels."},
    )
    ladder: list[str] = field(
        default_factory=lambda: ["off"], metadata={"choices": ["off", "on"], "help": "Of the paper's bridge."}
    )
    data: Path = field(
        default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")),
        metadata={"help": "Folder of TASK.train.jsonl and TASK.dev.jsonl; by default $HF_PEFT_EXT_DATA."},
    )
    output: Path | None = field(
        default=None,
        metadata={"help": "Folder for what is written; by default `results/plug_in/` and the pair's name."},
    )
    report: bool = field(default=False, metadata={"help": "Only make the table and the figure."})


def main(study: Study, protocol: Protocol) -> None:
    folder = study.output or RESULTS / "plug_in" / protocol.pair
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.csv"
    if not study.report:
        check_protocol(folder / "protocol.json", asdict(protocol))
        done = {Run(*(row[name] for name in Run._fields)) for row in read_rows(file)}
        todo = [run for run in runs(study) if run._replace(seed=str(run.seed)) not in done]  # pyright: ignore
        for (task, seed), group in itertools.groupby(todo, key=lambda run: (run.task, run.seed)):
            cell = Cell.of(study.data, folder, protocol, task, seed)
            for run in group:
                row = run._asdict() | cell.results(run)
                append(file, row)
                console.print("  ".join(f"{name} {value}" for name, value in row.items() if value != ""))
    rows = read_rows(file)
    (folder / "table.md").write_text(table(rows), encoding="utf-8")
    draw(rows, folder / "figure.png")
    with_variants = draw_variants(rows, folder / "variants.png")
    figures = "figure.png and variants.png" if with_variants else "and figure.png"
    console.print(f"Written: {file}, table.md, {figures}")


def runs(study: Study) -> list[Run]:
    """All runs of a study, cell by cell, each once."""
    found: dict[Run, None] = {}
    for task, seed in itertools.product(study.tasks, study.seeds):
        choices = study.modules, study.init, study.r, study.reading, study.importance, study.ladder
        for choice in itertools.product(*choices):
            for condition in study.conditions:
                found[Run(task, seed, condition, *variant(condition, *choice))] = None
    return list(found)


def variant(
    condition: str, module: str, init: str, r: int, reading: str, kind: str, ladder: str
) -> tuple[str, str, str]:
    """Module, init and bridge of a run; a setting that the condition does not depend on is empty."""
    has_ladder = condition in ("paper", "bridge") and ladder == "on"
    return (
        "" if condition in ("untouched", "full") else module,
        init if condition in PLUGGED else "",
        f"{r} {reading} {kind}{' ladder' if has_ladder else ''}" if condition in BRIDGED else "",
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to each other
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main(*HfArgumentParser((Study, Protocol), description=__doc__).parse_args_into_dataclasses())  # pyright: ignore
