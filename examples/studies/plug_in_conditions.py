"""The conditions of the plug-in study: what each one trains on a task and a seed, and how it is scored."""

import copy
import itertools
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from hf_peft_ext import BottleneckConfig, LayerPrefixConfig
from hf_peft_ext.pruning import Importance, PrunedModel, importance, pruned_copy
from hf_peft_ext.transfer import Projections, bridge, delta_bridge, layer_scales, merge_projections, plug
from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensors
from hf_peft_ext.transfer.refine.distillation import decide
from hf_peft_ext.transfer.refine.module_scale import at_scale, choose_scale
from hf_peft_ext.transfer.refine.stage_training import fit, refine
from hf_peft_ext.transfer.run.result import Measured
from hf_peft_ext.transfer.run.task import Task, task_for
from plug_in_models import Protocol, as_row, fit_head, load, lowered, small_of
from runs import Row, read


class Module(NamedTuple):
    """An adapter's config, and its learning rates: with gradients, in a bridge, and with MeZO."""

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
BEFORE = dict.fromkeys(FROM_SMALL, "small") | {"refined": "delta"}  # the condition whose adapter it starts from


class Run(NamedTuple):
    """A row of `runs.csv` without its results; settings that a condition does not depend on are empty."""

    task: str
    seed: int
    condition: str
    module: str
    init: str
    bridge: str  # for example "16 parameters activation", " ladder" added for one with a ladder


@dataclass
class Cell:
    """A task and a seed: its rows, the two models with their heads, and the adapters trained so far."""

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
        """Accuracy, AUC and margin on test rows, the scale chosen on dev rows, and the process time."""
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
        """The folder of a condition's adapter, trained if it does not exist yet, and the process time that it took."""
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
        """The trained model of a condition, and its bridge if the bridge is measured too."""
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
        """The pruned copy that a run's bridge consists of."""
        r, reading, kind, *_ = run.bridge.split()
        return pruned_copy(copy.deepcopy(self.large), int(r), reading, self.importance(kind)[0])  # pyright: ignore

    def importance(self, kind: str) -> tuple[Importance, float]:
        """Scores of the large model's channels on the training rows, and the process time that they took."""
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
