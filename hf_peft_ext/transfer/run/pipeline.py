"""The stages of plug-in transfer. Each writes an artefact, and is not repeated where its artefact exists."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_peft_ext.pruning import Importance, PrunedModel, importance, pruned_copy
from hf_peft_ext.transfer.bridges.bridge import paper_bridge
from hf_peft_ext.transfer.bridges.delta import hold
from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensors
from hf_peft_ext.transfer.map.bake import merge_projections
from hf_peft_ext.transfer.map.plug import plug_tensors
from hf_peft_ext.transfer.map.projections import Projections
from hf_peft_ext.transfer.refine.distillation import decide
from hf_peft_ext.transfer.refine.mezo import add_layer_scales
from hf_peft_ext.transfer.refine.module_scale import at_scale, choose_scale, scale_by
from hf_peft_ext.transfer.refine.stage_training import Advance, fit, refine
from hf_peft_ext.transfer.run.result import Measured, PlugInResult
from hf_peft_ext.transfer.run.settings import PlugInSettings
from hf_peft_ext.transfer.run.task import Row, Task


@dataclass
class Stages:
    """The stages of one run.

    Args:
        folder: for the artefacts.
        settings: of the run.
        task: the rows'.
        rows: with answers.
        bars: where progress is shown.
        soft_labels: rows with the small model's probabilities as targets; bridge and refinement train on them too.
    """

    folder: Path
    settings: PlugInSettings
    task: Task
    rows: Sequence[Row]
    bars: Progress
    soft_labels: list[Row] = field(default_factory=list)

    @property
    def training_rows(self) -> list[Row]:
        """The rows that bridge and refinement train on."""
        return [*self.rows, *self.soft_labels]

    def small(self, model: nn.Module, config: PeftConfig | None) -> AdapterTensors:
        """Train a small model with a fresh adapter, or load that adapter."""
        path, s = self.folder / "small", self.settings
        if path.exists():
            return AdapterTensors(PeftModel.from_pretrained(model, path))  # pyright: ignore[reportArgumentType]
        torch.manual_seed(s.seed)
        own: Any = deepcopy(config)  # peft writes into it
        tuned: Any = get_peft_model(model, own)  # pyright: ignore[reportArgumentType]
        tensors = AdapterTensors(tuned)  # raises for a kind that cannot be plugged in
        with self.bar("small", s.small_steps) as advance:
            fit(tuned, self.task, self.rows, s.small_steps, s.small_lr, s.batch_size, s.seed, True, advance)
        write(path, tuned.save_pretrained)
        return tensors

    def decisions(self, tuned: PeftModel, unlabelled: Sequence[Row]) -> list[Row]:
        """These rows with the small model's probabilities as targets."""
        path, s = self.folder / "decisions.json", self.settings
        if not path.exists():
            unanswered = [{name: row[name] for name in self.task.asks} for row in unlabelled]
            with self.bar("decisions", 1) as advance:
                text = json.dumps(decide(self.task, tuned, unanswered, s.temperature), indent=1, ensure_ascii=False)
                advance()
            write(path, lambda where: where.write_text(text + "\n", encoding="utf-8"))
        return json.loads(path.read_text(encoding="utf-8"))

    def plugged(self, tuned: AdapterTensors, large: PreTrainedModel) -> AdapterTensors:
        """The large model with the adapter, trained in a bridge and merged."""
        path, s = self.folder / "plugged", self.settings
        if path.exists():
            return AdapterTensors(PeftModel.from_pretrained(large, path, is_trainable=True).eval())
        pruned = None if s.bridge == "none" else pruned_copy(large, s.r, s.reduce, self.importance(large))
        torch.manual_seed(s.seed)
        batches = self.batches(large, 1) if s.init == "least_squares" else None
        tensors = plug_tensors(tuned, large, Projections(s.init, s.sides, s.train_projections), s.order, batches)
        tensors.model.eval()
        if pruned is not None:
            self.train_in_bridge(tensors, pruned)
        write(path, lambda folder: save_adapter(merge_projections(tensors.model), folder))
        return tensors

    def train_in_bridge(self, plugged: AdapterTensors, pruned: PrunedModel) -> None:
        """Train the plugged adapter in the bridge of the settings."""
        s, rows = self.settings, self.training_rows
        steps = s.bridge_steps, s.bridge_lr, s.batch_size, s.seed, False
        with self.bar(f"{s.bridge} bridge", s.bridge_steps) as advance:
            if s.bridge == "paper":
                cache = self.folder / "activations" if s.ladder else None
                fit(paper_bridge(plugged, pruned, ladder=s.ladder, cache=cache), self.task, rows, *steps, advance)
            else:
                with hold(plugged, pruned, s.around) as held:
                    fit(held, self.task, rows, *steps, advance)

    def importance(self, large: PreTrainedModel) -> Importance:
        """The scores that choose the bridge's channels."""
        path, s = self.folder / "importance.safetensors", self.settings
        if not path.exists():
            with self.bar("importance", 1) as advance:
                scores = importance(large, self.batches(large, s.batch_size), s.importance)
                advance()
            tables = {"rows": scores.rows, "columns": scores.columns}
            state = {f"{name}:{key}": value for name, table in tables.items() for key, value in table.items()}
            write(path, lambda where: save_file({k: v.contiguous() for k, v in state.items()}, where))
        scores = Importance(s.importance)
        for name, value in load_file(path).items():
            kind, _, key = name.partition(":")
            getattr(scores, kind)[key] = value
        return scores

    def batches(self, large: PreTrainedModel, size: int) -> Iterator[dict[str, Tensor]]:
        """The training rows with their answers, `size` at a time, sorted by length, which saves padding."""
        rows = sorted(self.rows, key=lambda row: len(row[self.task.asks[0]]))
        return (self.task.batch(large, rows[i : i + size]) for i in range(0, len(rows), size))

    def refined(self, tensors: AdapterTensors) -> AdapterTensors:
        """The adapter after MeZO."""
        path, s, model = self.folder / "refined", self.settings, tensors.model
        if path.exists():
            large: Any = model.unload()  # pyright: ignore[reportCallIssue]
            return AdapterTensors(PeftModel.from_pretrained(large, path).eval())
        if s.refine == "scales":
            add_layer_scales(tensors)
        with self.bar("MeZO", s.refine_steps) as advance:
            rows = self.training_rows
            refine(model, self.task, rows, s.refine_steps, s.refine_lr, s.batch_size, s.eps, s.seed, advance)
        write(path, lambda folder: save_adapter(merge_projections(model), folder))
        return tensors

    def measured(self, tensors: AdapterTensors, dev: Sequence[Row], test: Sequence[Row]) -> PlugInResult:
        """The result. The model then has the chosen scale, or its adapter is disabled if there is no gain."""
        path, model = self.folder / "result.json", tensors.model
        if path.exists():
            result = PlugInResult.load(path)
        else:
            with self.bar("measuring", 1) as advance:
                result = self.measure(tensors, dev, test)
                advance()
        if result.gains:
            scale_by(tensors.added(), result.scale)
            if not (self.folder / "adapter").exists():
                write(self.folder / "adapter", lambda folder: save_adapter(model, folder))
        else:
            model.base_model.disable_adapter_layers()  # pyright: ignore[reportCallIssue]
        if not path.exists():
            write(path, result.save)
        return result

    def measure(self, tensors: AdapterTensors, dev: Sequence[Row], test: Sequence[Row]) -> PlugInResult:
        """Choose the scale on `dev`; measure base and plugged model on `test`."""
        scale, tried = choose_scale(tensors, self.task, dev, self.settings.scales)
        base, plugged = (self.measure_at(tensors, factor, test) for factor in (0.0, scale))
        return PlugInResult.of(base, plugged, scale, tried, self.settings.seed)

    def measure_at(self, tensors: AdapterTensors, scale: float, rows: Sequence[Row]) -> Measured:
        """Measure the model with its adapter at a scale."""
        with at_scale(tensors, scale):
            return Measured.of(self.task.scores(tensors.model, rows), self.task.answers(rows))

    @contextmanager
    def bar(self, name: str, steps: int) -> Iterator[Advance]:
        """A progress bar; yields the function that advances it by a step."""
        task = self.bars.add_task(name, total=steps)
        yield lambda: self.bars.advance(task)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save a model's one adapter in the folder itself; peft takes a subfolder for names other than "default"."""
    model.save_pretrained(str(folder))
    (name,) = model.peft_config
    inner = folder / name
    if inner.is_dir():
        for file in inner.iterdir():
            file.replace(folder / file.name)
        inner.rmdir()


def write(path: Path, save: Callable[[Any], Any]) -> None:
    """Write a file or a folder under a temporary name; it gets its own when it is complete."""
    partial = path.with_name(f"partial-{path.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    save(partial)
    partial.rename(path)
