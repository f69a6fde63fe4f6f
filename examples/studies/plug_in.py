"""Plug-in transfer on small pairs: does a module of the small model help the large one, and what does each way cost?

    pip install -e ".[studies]"
    HF_PEFT_EXT_DATA=folder python examples/studies/plug_in.py --tasks sst2 trec --seeds 0 1 2
    HF_PEFT_EXT_DATA=folder python examples/studies/plug_in.py --pair smollm2 --tasks sst2 comve copa

Pairs: "minilm" is MiniLM-L6 and three of its layers; "smollm2" is SmolLM2-135M and 24 of its 30 layers at three
quarters of the width, healed on the data folder's text, which is done once for an `--output`. Language models rank
the answers of the first prompt template of a task. MiniLM has a classification head, for which every condition, that
of the untouched model too, starts with a logistic regression on what the frozen model makes of the training rows; a
module is trained without touching it, so that a gain is its own.

Conditions:

    untouched   the large model (with its head)
    small       the small model with a module
    unbridged   that module, plugged into the large model as it is
    paper       the same after training in the paper's bridge; it also gives
    bridge      the bridge itself
    delta       after training in the delta bridge
    refined     the same, one scale for each layer refined by MeZO
    distilled   as delta, with rows without answers besides, which the small model answers in probabilities
    folded      as delta, with W_plug folded in before, so that the module itself is trained at full width (where both
                models have the same channels and W_plug is a slice, that is no difference)
    fresh       a fresh module on the large model, trained in the delta bridge: what the small model was good for
    mezo        a fresh module on the large model, by forward passes alone
    peft        a fresh module on the large model, by its gradients
    full        full fine-tuning

Each run becomes a row of `runs.csv` in `--output` when it is done; started again, the study goes on with those that
are missing. Test rows are the task's dev split, which nothing is chosen by; `scale` is the factor of the module that
is best on dev rows drawn from train (0 is the untouched model), and `safe` the accuracy at it. `seconds` is process
time on the way to a condition, stages before it included; scoring and the small model's healing are not.
"""

import copy
import itertools
import json
import os
import random
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from hf_peft_ext import BottleneckConfig, LayerPrefixConfig
from hf_peft_ext.prompts import load_templates
from hf_peft_ext.pruning import Importance, PrunedModel, importance, pruned_copy
from hf_peft_ext.transfer import Projections, bridge, delta_bridge, layer_scales, merge_projections, plug
from hf_peft_ext.transfer.bridges.bridge import kept_channels
from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensors
from hf_peft_ext.transfer.map.plug import depths
from hf_peft_ext.transfer.map.projections import layer_map
from hf_peft_ext.transfer.refine.distillation import decide
from hf_peft_ext.transfer.refine.module_scale import at_scale, choose_scale
from hf_peft_ext.transfer.refine.stage_training import fit, refine
from hf_peft_ext.transfer.run.result import Measured
from hf_peft_ext.transfer.run.task import Task, task_for
from hf_peft_ext.tuners.ladder.network import cut_depth
from plug_in_figures import draw, draw_variants
from runs import (
    MINILM,
    RESULTS,
    SMOLLM2,
    Row,
    append,
    check_protocol,
    exact_head,
    find_model,
    language_model,
    read,
    read_rows,
)

console = Console()


class Module(NamedTuple):
    """What is trained, and at what rates: in a model by its gradients, in a bridge, and by MeZO."""

    config: PeftConfig
    lr: float
    bridge_lr: float
    mezo_lr: float


MODULES = {
    "lora": Module(
        LoraConfig(r=8, lora_alpha=16, target_modules=r".*\.(query|value|q_proj|v_proj)"), 2e-3, 1e-3, 1e-3
    ),
    "adapter": Module(BottleneckConfig(r=16, reduction_factor=None), 2e-3, 1e-3, 1e-3),
    "prefix": Module(LayerPrefixConfig(num_virtual_tokens=10), 2e-2, 1e-2, 1e-2),
}
PLUGGED = ("unbridged", "paper", "bridge", "delta", "refined", "distilled", "folded")
BRIDGED = (*PLUGGED[1:], "fresh")
CONDITIONS = ("untouched", "small", *PLUGGED, "fresh", "mezo", "peft", "full")
FROM_SMALL = ("unbridged", "paper", "delta", "distilled", "folded")
BEFORE = dict.fromkeys(FROM_SMALL, "small") | {"refined": "delta"}  # whose adapter it starts from
TO_HEAL = "wikitext2.valid.txt"
TEXTS = ("text", "question", "premise", "sentence", "sentence1", "hypothesis", "sentence2")  # in this order


@dataclass
class Protocol:
    """What all runs of an output share."""

    pair: str = field(default="minilm", metadata={"choices": ["minilm", "smollm2"]})
    model: str = field(default="", metadata={"help": "The large model, if it is another one of the pair's kind."})
    k: int = field(default=200, metadata={"help": "Training rows."})
    dev_rows: int = field(default=100, metadata={"help": "Other rows of train, to choose the scale by."})
    unlabelled: int = field(default=600, metadata={"help": "Others, at most, whose answers are not looked at."})
    test_rows: int = field(default=400, metadata={"help": "Most test rows."})
    steps: int = field(default=200, metadata={"help": "Of the small model, PEFT and full fine-tuning."})
    bridge_steps: int = field(default=100, metadata={"help": "Of either bridge."})
    mezo_steps: int = field(default=200, metadata={"help": "Of MeZO."})
    heal_steps: int = field(default=300, metadata={"help": "Of SmolLM2's small one, on text."})
    heal_lr: float = field(default=5e-4, metadata={"help": "Its rate."})
    batch_size: int = field(default=8, metadata={"help": "Rows in a step."})
    scales_lr: float = field(default=1e-1, metadata={"help": "Rate of MeZO for the scales of layers."})
    full_lr: float = field(default=5e-5, metadata={"help": "Rate of full fine-tuning."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16, but for MeZO, which it would drown."})
    measured_on: str = field(default="test", metadata={"choices": ["test", "dev"], "help": "dev to choose rates by."})


@dataclass
class Study:
    """Which runs, and where things are."""

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


class Run(NamedTuple):
    """A row of `runs.csv`, less its results; what a condition does not depend on is empty."""

    task: str
    seed: int
    condition: str
    module: str
    init: str
    bridge: str  # "16 parameters activation", with " ladder" behind it


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
    """All runs that a study asks for, cell by cell, each once."""
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
    """What of the choices a condition depends on."""
    has_ladder = condition in ("paper", "bridge") and ladder == "on"
    return (
        "" if condition in ("untouched", "full") else module,
        init if condition in PLUGGED else "",
        f"{r} {reading} {kind}{' ladder' if has_ladder else ''}" if condition in BRIDGED else "",
    )


# A task and a seed


@dataclass
class Cell:
    """The rows of a task and a seed, the two models with their heads, and what was made of them."""

    large: Any
    small: Any
    index: dict[Any, torch.Tensor]  # which channels of the large model the small one has
    task: Task
    exact: Task  # the same in float32, for MeZO
    train: list[Row]
    dev: list[Row]
    unlabelled: list[Row]
    test: list[Row]
    folder: Path
    protocol: Protocol
    seed: int
    importances: dict[str, tuple[Importance, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Path, output: Path, protocol: Protocol, task: str, seed: int) -> "Cell":
        drawn = read(data, task, "train")
        count = min(len(drawn), protocol.k + protocol.dev_rows + protocol.unlabelled)
        drawn = random.Random(seed).sample(drawn, count)
        test = read(data, task, "dev")
        test = random.Random(0).sample(test, min(protocol.test_rows, len(test)))
        labels = 1 + max(row["label"] for row in read(data, task, "train"))
        large, tokenizer = load(protocol, labels)
        rows = [as_row(protocol.pair, task, row, tokenizer) for row in [*drawn, *test]]
        bounds = itertools.accumulate(
            (protocol.k, protocol.dev_rows, count - protocol.k - protocol.dev_rows), initial=0
        )
        train, dev, unlabelled = (rows[a:b] for a, b in itertools.pairwise(bounds))
        test = rows[count:]
        small, index = small_of(large, tokenizer, data, output, protocol)
        exact = task_for(tokenizer, rows)
        judge = lowered(exact, protocol)
        test = dev if protocol.measured_on == "dev" else test
        if protocol.pair == "minilm":
            for model in (large, small):
                fit_head(model, judge, train)
        folder = output / "modules" / f"{task}-{seed}"
        return cls(large, small, index, judge, exact, train, dev, unlabelled, test, folder, protocol, seed)

    def results(self, run: Run) -> Row:
        """Accuracy, AUC and margin on test rows, the scale chosen on dev rows, and process time."""
        if run.condition == "untouched":
            return self.measured(self.large, 0.0)
        if run.condition == "full":
            return self.full()
        if run.condition == "bridge":
            path, _ = self.adapter(run._replace(condition="paper"))
            return json.loads((path / "bridge.json").read_text(encoding="utf-8"))
        path, seconds = self.adapter(run)
        model = self.load(run.condition, path)
        row = self.measured(model, seconds)
        if run.condition in (*PLUGGED, "fresh"):
            tensors = AdapterTensors(model)
            scale, _ = choose_scale(tensors, self.task, self.dev, (0.25, 0.5, 1.0))
            with at_scale(tensors, scale):
                row |= {"scale": scale, "safe": self.measured(model, 0.0)["accuracy"]}
        return row

    def measured(self, model: Any, seconds: float) -> Row:
        found = Measured.of(self.task.scores(model, self.test), self.task.answers(self.test))
        numbers = {name: round(getattr(found, name), 4) for name in ("accuracy", "auc", "margin")}
        return {**numbers, "scale": "", "safe": "", "seconds": round(seconds, 1)}

    def load(self, condition: str, path: Path) -> PeftModel:
        base = copy.deepcopy(self.small if condition == "small" else self.large)
        return PeftModel.from_pretrained(base, path).eval()

    def adapter(self, run: Run) -> tuple[Path, float]:
        """Where a condition's adapter is, made if it is not there, and the process time that it took."""
        what = run._replace(module=run.module or "", bridge=run.bridge.replace(" ", "_"))
        path = self.folder / "-".join(filter(None, what[2:]))
        if not path.exists():
            model, spent = None, 0.0
            before = BEFORE.get(run.condition)
            if before == "small":
                path_before, spent = self.adapter(run._replace(condition="small", init="", bridge=""))
                model = self.load("small", path_before)
            elif before:
                path_before, spent = self.adapter(run._replace(condition=before))
                model = self.load(before, path_before)
            if run.bridge and run.condition != "refined":
                spent += self.importance(run.bridge.split()[2])[1]
            start = time.process_time()
            torch.manual_seed(self.seed)
            trained, extra = self.trained(run, model)
            spent += time.process_time() - start
            partial = path.with_name(f"partial-{path.name}")
            merge_projections(trained).save_pretrained(str(partial))
            if extra is not None:
                scores = json.dumps(self.measured(extra, spent))
                (partial / "bridge.json").write_text(scores, encoding="utf-8")
            (partial / "seconds").write_text(str(spent), encoding="utf-8")
            partial.rename(path)
        return path, float((path / "seconds").read_text(encoding="utf-8"))

    def trained(self, run: Run, before: PeftModel | None) -> tuple[PeftModel, PeftModel | None]:
        """The model of a condition, trained; and its bridge, if that is to be measured."""
        p, module = self.protocol, MODULES[run.module]
        if run.condition in ("small", "peft", "mezo", "fresh"):
            base = copy.deepcopy(self.small if run.condition == "small" else self.large)
            model: Any = get_peft_model(base, copy.deepcopy(module.config))
        elif run.condition in FROM_SMALL:
            assert before is not None
            model = self.plugged(run, before)
        else:
            model = before
        model.eval()
        steps = p.bridge_steps, module.bridge_lr, p.batch_size, self.seed
        if run.condition in ("small", "peft"):
            fit(model, self.task, self.train, p.steps, module.lr, p.batch_size, self.seed, dropout=True)
        elif run.condition == "mezo":
            refine(model, self.exact, self.train, p.mezo_steps, module.mezo_lr, p.batch_size, seed=self.seed)
        elif run.condition == "refined":
            layer_scales(model)
            refine(model, self.exact, self.train, p.mezo_steps, p.scales_lr, p.batch_size, seed=self.seed)
        elif run.condition in ("delta", "distilled", "folded", "fresh"):
            rows = self.train
            if run.condition == "distilled":
                rows = rows + decide(self.task, before, self.unlabelled)  # pyright: ignore[reportArgumentType]
            if run.condition == "folded":
                model = merge_projections(model)
            with delta_bridge(model, self.pruned(run)) as held:
                fit(held, self.task, rows, *steps)
        elif run.condition == "paper":
            cache = self.folder / "activations" / run.bridge
            built = bridge(model, self.pruned(run), ladder="ladder" in run.bridge, cache=cache)
            fit(built, self.task, self.train, *steps)
            return model, built
        return model, None

    def plugged(self, run: Run, module: PeftModel) -> PeftModel:
        large = copy.deepcopy(self.large)
        projections: Any = Projections(run.init, index=self.index)  # pyright: ignore[reportArgumentType]
        batches = (self.task.batch(large, [row]) for row in self.train) if run.init == "least_squares" else None
        return plug(module, large, projections, batches=batches)

    def pruned(self, run: Run) -> PrunedModel:
        """The bridge of a run."""
        r, reading, kind, *_ = run.bridge.split()
        return pruned_copy(copy.deepcopy(self.large), int(r), reading, self.importance(kind)[0])  # pyright: ignore

    def importance(self, kind: str) -> tuple[Importance, float]:
        """Of the large model's channels on the training rows, and the process time that it took."""
        if kind not in self.importances:
            start, size = time.process_time(), self.protocol.batch_size
            parts = (self.train[i : i + size] for i in range(0, len(self.train), size))
            found = importance(copy.deepcopy(self.large), (self.task.batch(self.large, part) for part in parts), kind)  # pyright: ignore
            self.importances[kind] = found, time.process_time() - start
        return self.importances[kind]

    def full(self) -> Row:
        start, p = time.process_time(), self.protocol
        torch.manual_seed(self.seed)
        model = copy.deepcopy(self.large).requires_grad_(True)
        fit(model, self.task, self.train, p.steps, p.full_lr, p.batch_size, self.seed, dropout=True)
        return self.measured(model, time.process_time() - start)


# Models and rows


def load(protocol: Protocol, labels: int) -> tuple[Any, Any]:
    """The large model and its tokenizer."""
    if protocol.pair == "smollm2":
        model, tokenizer = language_model(protocol.model or SMOLLM2)
        model = copy.deepcopy(model).eval()
        exact_head(model)
        return model, tokenizer
    source = find_model(protocol.model or MINILM)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels)
    return model.eval(), AutoTokenizer.from_pretrained(source)


def as_row(pair: str, task: str, row: Row, tokenizer: Any) -> Row:
    """A row of data as the model's task takes it."""
    if pair == "smollm2":
        return load_templates(task)[0].render(row)
    texts = [row[name] for name in TEXTS if name in row]
    return {"text": f" {tokenizer.sep_token} ".join(texts), "label": row["label"]}


def small_of(
    large: Any, tokenizer: Any, data: Path, output: Path, protocol: Protocol
) -> tuple[Any, dict[Any, torch.Tensor]]:
    """The small model, and which channels of the large one each of its spaces has, by layers of the large one."""
    (depth,) = depths(large)
    text = None if protocol.pair == "minilm" else reading(tokenizer, data)
    if text is None:
        pruned = pruned_copy(cut_depth(copy.deepcopy(large), list(range(0, depth, 2))), 1)
    else:
        batches = ({"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in text[:64].split(8))
        cut = cut_depth(copy.deepcopy(large), [i for i in range(depth) if i % 5 != 2])
        pruned = pruned_copy(cut, 4 / 3, "width", importance(cut, batches, "activation"))
    layers = layer_map(depths(pruned.model), [depth])
    kept = kept_channels(pruned)
    index = {(name, None): units for (name, layer), units in kept.items() if layer is None}
    index |= {(name, i): kept[name, j] for i, j in enumerate(layers) for name, layer in kept if layer == j}
    return (pruned.model if text is None else healed(pruned.model, text, output / "small", protocol)), index


def lowered(task: Any, protocol: Protocol) -> Any:
    """The task with its forward passes under autocast, if that is asked for."""
    if protocol.bf16:
        task = copy.copy(task)
        for name in {"loss", "scores"} & set(dir(task)):
            setattr(task, name, torch.autocast("cpu", torch.bfloat16)(getattr(task, name)))
    return task


def reading(tokenizer: Any, data: Path, length: int = 128) -> torch.Tensor:  # shape: (rows, length)
    """The text that the small model is healed on, as tokens."""
    ids = torch.tensor(tokenizer((data / TO_HEAL).read_text(encoding="utf-8")).input_ids)
    return ids[: len(ids) // length * length].view(-1, length)


class Reading:
    """A language model's loss on tokens of text; a task as far as `fit` asks."""

    def loss(self, model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
        ids = torch.stack(rows)
        return model(input_ids=ids, labels=ids).loss


def healed(small: Any, text: torch.Tensor, path: Path, protocol: Protocol) -> Any:
    """The small model after some training on text, done once."""
    if not path.exists():
        start = time.process_time()
        fit(small, lowered(Reading(), protocol), list(text), protocol.heal_steps, protocol.heal_lr)  # pyright: ignore
        small.save_pretrained(path.with_name("partial-small"))
        path.with_name("partial-small").rename(path)
        console.print(f"healed in {time.process_time() - start:.0f} s of process time")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    exact_head(model)
    return model


@torch.no_grad()
def fit_head(model: Any, task: Task, rows: list[Row]) -> None:
    """Make the classification head a logistic regression on what it reads of the frozen model."""
    read_by_head: list[torch.Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: read_by_head.append(args[0]))
    task.scores(model, rows)
    handle.remove()
    x = torch.cat(read_by_head).float()
    centre, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    found = LogisticRegression(C=0.01, max_iter=1000).fit(((x - centre) / scale).numpy(), task.answers(rows))
    weight = torch.from_numpy(found.coef_).float() / scale
    bias = torch.from_numpy(found.intercept_).float() - weight @ centre
    if len(bias) == 1:  # of two answers, the log-odds of the second
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    model.classifier.weight.zero_()
    model.classifier.bias.fill_(float(bias.min()) - 5)  # answers that no row has
    model.classifier.weight[found.classes_] = weight
    model.classifier.bias[found.classes_] = bias


# Report


def label(row: Row) -> str:
    return ", ".join(filter(None, (row["condition"], row["module"], row["init"], row["bridge"])))


def by_condition(rows: list[Row]) -> dict[str, list[Row]]:
    """Label -> its rows, in the order of `CONDITIONS`."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: CONDITIONS.index(row["condition"])):
        found.setdefault(label(row), []).append(row)
    return found


def table(rows: list[Row]) -> str:
    """By task: accuracy in % (mean ± standard deviation over seeds), AUC and margin, and the mean gain over the
    untouched model with its standard error, at scale 1 and at the scale chosen on dev rows; seconds.
    """
    tasks = sorted({row["task"] for row in rows})
    base = {(row["task"], row["seed"]): float(row["accuracy"]) for row in rows if row["condition"] == "untouched"}
    columns = [f"{task}: {what}" for task in tasks for what in ("accuracy / AUC / margin", "gain / safe gain")]
    lines = [f"| condition | {' | '.join(columns)} | s |", "|---" + "|--:" * (len(columns) + 1) + "|"]
    for name, found in by_condition(rows).items():
        cells = [name]
        for task in tasks:
            here = [row for row in found if row["task"] == task]
            accuracy, auc, margin = ([float(row[x]) for row in here] for x in ("accuracy", "auc", "margin"))
            cells.append(f"{spread(accuracy, 100)} / {mean(auc):.3f} / {mean(margin):+.2f}" if here else "")
            gains = [gain(here, column, base) for column in ("accuracy", "safe")]
            cells.append(" / ".join(filter(None, gains)) if name != "untouched" else "")
        cells.append(f"{mean(float(row['seconds']) for row in found):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gain(rows: list[Row], column: str, base: dict[tuple[str, str], float]) -> str:
    """Of one task, in points."""
    pairs = [(row[column], base.get((row["task"], row["seed"]))) for row in rows]
    gains = [100 * (float(x) - b) for x, b in pairs if x != "" and b is not None]
    error = f" ± {stdev(gains) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
    return f"{mean(gains):+.1f}{error}" if gains else ""


def spread(values: list[float], factor: float) -> str:
    values = [factor * value for value in values]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to each other
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main(*HfArgumentParser((Study, Protocol), description=__doc__).parse_args_into_dataclasses())  # pyright: ignore
