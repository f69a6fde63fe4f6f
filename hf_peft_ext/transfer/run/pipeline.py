"""The stages of a plug-in transfer, each of which leaves an artefact and is not done again where that is there."""

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

from hf_peft_ext.pruning import Importance, importance, pruned_copy
from hf_peft_ext.transfer.bridges.bridge import bridge
from hf_peft_ext.transfer.bridges.delta import delta_bridge
from hf_peft_ext.transfer.map.adapter_tensors import parts_of
from hf_peft_ext.transfer.map.bake import merge_projections
from hf_peft_ext.transfer.map.plug import plug
from hf_peft_ext.transfer.map.projections import Projections
from hf_peft_ext.transfer.refine.distillation import decide
from hf_peft_ext.transfer.refine.mezo import layer_scales
from hf_peft_ext.transfer.refine.module_scale import at_scale, choose_scale, scale_by, writing
from hf_peft_ext.transfer.refine.training_loop import Advance, fit, refine
from hf_peft_ext.transfer.run.result import Measured, PlugInResult
from hf_peft_ext.transfer.run.settings import PlugInSettings
from hf_peft_ext.transfer.run.task import Row, Task


@dataclass
class Stages:
    """The stages of one run, each of which is done once.

    Args:
        folder: for the artefacts.
        settings: of the run.
        task: the rows'.
        rows: with answers.
        bars: where progress is shown.
        decided: rows whose answers are the small model's; they are trained on with the others from the bridge on.
    """

    folder: Path
    settings: PlugInSettings
    task: Task
    rows: Sequence[Row]
    bars: Progress
    decided: list[Row] = field(default_factory=list)

    @property
    def training_rows(self) -> list[Row]:
        return [*self.rows, *self.decided]

    def small(self, model: nn.Module, config: PeftConfig | None) -> PeftModel:
        """The small model with its adapter, trained if it has none."""
        if isinstance(model, PeftModel):
            return model
        path, s = self.folder / "small", self.settings
        if path.exists():
            return PeftModel.from_pretrained(model, path)  # pyright: ignore[reportArgumentType]
        torch.manual_seed(s.seed)
        given: Any = deepcopy(config)  # peft writes into it
        tuned: Any = get_peft_model(model, given)  # pyright: ignore[reportArgumentType]
        parts_of(tuned)  # raises where it is of a kind that cannot be plugged in
        with self.bar("small", s.small_steps) as advance:
            fit(tuned, self.task, self.rows, s.small_steps, s.small_lr, s.batch_size, s.seed, True, advance)
        finish(path, tuned.save_pretrained)
        return tuned

    def decisions(self, tuned: PeftModel, unlabelled: Sequence[Row]) -> list[Row]:
        """These rows with the small model's probabilities as targets."""
        path, s = self.folder / "decisions.json", self.settings
        if not path.exists():
            asked = [{name: row[name] for name in self.task.asks} for row in unlabelled]
            with self.bar("decisions", 1) as advance:
                text = json.dumps(decide(self.task, tuned, asked, s.temperature), indent=1, ensure_ascii=False)
                advance()
            finish(path, lambda where: where.write_text(text + "\n", encoding="utf-8"))
        return json.loads(path.read_text(encoding="utf-8"))

    def plugged(self, tuned: PeftModel, large: PreTrainedModel) -> PeftModel:
        path, s = self.folder / "plugged", self.settings
        if path.exists():
            return PeftModel.from_pretrained(large, path, is_trainable=True).eval()
        scores = self.importance(large)
        thin = None if s.bridge == "none" else pruned_copy(large, s.r, s.reduce, scores)
        torch.manual_seed(s.seed)
        batches = self.batches(large, 1) if s.init == "least_squares" else None
        model = plug(tuned, large, Projections(s.init, s.sides, s.train_projections), s.order, batches).eval()
        rows, steps = self.training_rows, (s.bridge_steps, s.bridge_lr, s.batch_size, s.seed, False)
        if thin is not None:
            with self.bar(f"{s.bridge} bridge", s.bridge_steps) as advance:
                if s.bridge == "paper":
                    cache = self.folder / "activations" if s.ladder else None
                    fit(bridge(model, thin, ladder=s.ladder, cache=cache), self.task, rows, *steps, advance)
                else:
                    with delta_bridge(model, thin, s.around) as held:
                        fit(held, self.task, rows, *steps, advance)
        finish(path, merge_projections(model).save_pretrained)
        return model

    def importance(self, large: PreTrainedModel) -> Importance | None:
        path, s = self.folder / "importance.safetensors", self.settings
        if s.bridge == "none":
            return None
        if not path.exists():
            with self.bar("importance", 1) as advance:
                found = importance(large, self.batches(large, s.batch_size), s.importance)
                advance()
            tables = {"rows": found.rows, "columns": found.columns}
            state = {f"{name}:{key}": value for name, table in tables.items() for key, value in table.items()}
            finish(path, lambda where: save_file({k: v.contiguous() for k, v in state.items()}, where))
        found = Importance(s.importance)
        for name, value in load_file(path).items():
            kind, _, key = name.partition(":")
            getattr(found, kind)[key] = value
        return found

    def batches(self, large: PreTrainedModel, size: int) -> Iterator[dict[str, Tensor]]:
        """The training rows with their answers, `size` at a time, like lengths together so that little is padded."""
        rows = sorted(self.rows, key=lambda row: len(row[self.task.asks[0]]))
        return (self.task.batch(large, rows[i : i + size]) for i in range(0, len(rows), size))

    def refined(self, model: PeftModel) -> PeftModel:
        path, s = self.folder / "refined", self.settings
        if path.exists():
            large: Any = model.unload()
            return PeftModel.from_pretrained(large, path).eval()
        if s.refine == "scales":
            layer_scales(model)
        with self.bar("MeZO", s.refine_steps) as advance:
            rows = self.training_rows
            refine(model, self.task, rows, s.refine_steps, s.refine_lr, s.batch_size, s.eps, s.seed, advance)
        finish(path, merge_projections(model).save_pretrained)
        return model

    def measured(self, model: PeftModel, dev: Sequence[Row], test: Sequence[Row]) -> PlugInResult:
        """The result; from here on the model has the scale that was chosen, or its adapter disabled without a gain."""
        path = self.folder / "result.json"
        if path.exists():
            result = PlugInResult.load(path)
        else:
            with self.bar("measuring", 1) as advance:
                result = self.measure(model, dev, test)
                advance()
        if result.gains:
            scale_by(writing(model), result.scale)
            if not (self.folder / "adapter").exists():
                finish(self.folder / "adapter", model.save_pretrained)
        else:
            model.base_model.disable_adapter_layers()  # pyright: ignore[reportCallIssue]
        if not path.exists():
            finish(path, result.save)
        return result

    def measure(self, model: PeftModel, dev: Sequence[Row], test: Sequence[Row]) -> PlugInResult:
        scale, tried = choose_scale(model, self.task, dev, self.settings.scales)
        base, plugged = (self.measure_at(model, factor, test) for factor in (0.0, scale))
        return PlugInResult.of(base, plugged, scale, tried, self.settings.seed)

    def measure_at(self, model: PeftModel, scale: float, rows: Sequence[Row]) -> Measured:
        with at_scale(model, scale):
            return Measured.of(self.task.scores(model, rows), self.task.answers(rows))

    @contextmanager
    def bar(self, name: str, steps: int) -> Iterator[Advance]:
        task = self.bars.add_task(name, total=steps)
        yield lambda: self.bars.advance(task)


def finish(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file or a folder; it gets its name when all of it is there."""
    partial = path.with_name(f"partial-{path.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    write(partial)
    partial.rename(path)
