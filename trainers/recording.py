"""Keeps the record of a run while it goes on: what its card will tell."""

import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..hub_cards import Result, TrainingRecord
from ..hub_cards.metadata import check_metadata
from ..hub_cards.places import local, without_places
from ..hub_cards.told import quantization
from ..papers import Paper
from ..placement import check
from .data import DataLog
from .facts import hardware, hyperparameters, peak_memory, versions
from .secret import command_line, without_secrets

STEPS = 1000  # the median step is that of the last so many
NOT_RESULTS = ("_runtime", "_per_second", "_time", "_timestamp", "_entropy", "_num_tokens")


class Recording(DataLog):
    """Fills `record`, a `TrainingRecord` that is saved beside every adapter.

    What a trainer cannot know (`language`, `license`, `recipe`, results of other runs) is set on `record` or given to
    `record_results`, and kept.
    """

    _name: ClassVar[str] = "Adapter"
    _paper: ClassVar[Paper | None] = None
    _tags: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *args: Any, **kwargs: Any):
        self.clock = Clock()
        self._method = "adapter"
        self._measured: dict[tuple[Any, ...], Result] = {}  # of the adapter's weights as they are
        super().__init__(*args, **kwargs)
        self.add_callback(self.clock)

    # Results

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self._measured = {}  # of weights that are no more
        return super().training_step(model, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        self._note_results(output.metrics or {}, kwargs.get("metric_key_prefix", "eval"))
        return output

    def _note_results(self, metrics: Mapping[str, float], prefix: str) -> None:
        part, _, name = prefix.removeprefix("base_").partition("_")
        evaluated, called = self._evaluated
        data = self._note_data(evaluated, called or name or part, "eval")
        dataset = data.name if data else None
        split = (data.split if data else None) or {"eval": "evaluation"}.get(part, part)
        if data and data.on_hub and called and called != split:  # several sets may be parts of this one
            split = f"{split} ({called})"
        for key, value in metrics.items():
            metric = key.removeprefix(f"{prefix}_")
            if isinstance(value, (int, float)) and not key.endswith(NOT_RESULTS):
                result = Result(metric, float(value), method=self._method, dataset=dataset, split=split)
                if self._method == "adapter":
                    self._measured[result.place] = result
                else:
                    self._keep(result)

    def evaluate_base(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Evaluate the model without its adapter, and record that beside the adapter's results.

        Args:
            eval_dataset: as in `evaluate`.
            metric_key_prefix: as in `evaluate`; the metrics are logged with `base_` before it.
        """
        with self._measuring("base"), self.peft_model.disable_adapter():
            return self.evaluate(eval_dataset, metric_key_prefix=f"base_{metric_key_prefix}", **kwargs)

    def record_results(
        self,
        results: Mapping[str, float | Sequence[float]] | TrainingRecord,
        method: str = "adapter",
        dataset: str | None = None,
        split: str | None = None,
    ) -> None:
        """Record numbers measured elsewhere: several runs of this adapter, or a baseline.

        Args:
            results: metric -> its value, or its values in several runs; or the record of another run, whose results
                are taken.
            method: what was measured: "adapter", "base", "lora"...
            dataset: the data it was measured on; with `split` left out too, that on which this trainer has measured
                the same metric last.
            split: which part of it.

        Raises:
            ValueError: a metric has no values.
        """
        if isinstance(results, TrainingRecord):
            for result in results.results:
                if result.method == "adapter":
                    self._keep(Result(**{**asdict(result), "method": method}))
            return
        for metric, value in results.items():
            values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]
            check("results", {metric: value}, bool(values), "must have a value for each metric")
            spread = statistics.stdev(values) if len(values) > 1 else None
            place = (dataset, split)
            if place == (None, None):
                here = [(r.dataset, r.split) for r in self._measured.values() if r.metric == metric]
                place = here[-1] if here else place
            self._keep(Result(metric, statistics.fmean(values), spread, len(values), method, *place))

    def _keep(self, result: Result) -> None:
        self.record.results = [*(r for r in self.record.results if r.place != result.place), result]

    @contextmanager
    def _measuring(self, method: str) -> Iterator[None]:
        before, self._method = self._method, method
        try:
            yield
        finally:
            self._method = before

    # The record

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the other class does.

        Raises:
            ValueError: the record has a language, a licence or a task that the Hub would refuse.
        """
        self._check_record()
        return super().train(*args, **kwargs)

    def _check_record(self) -> None:
        check_metadata({name: getattr(self.record, name) for name in ("language", "license", "pipeline_tag", "tags")})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._check_record()  # before anything is written
        if self.args.should_save and self._unfinished is None:  # first: the card is written with the adapter
            folder = self.adapter_folder(cast(str, output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self.filled_record().save(folder)
        super()._save(output_dir, state_dict)

    def _complete(self, written: Path, final: Path) -> None:
        self.filled_record().save(self.adapter_folder(written))  # last: no figures are drawn for a checkpoint
        super()._complete(written, final)

    def _begin(self, resumed: Path | None) -> None:
        super()._begin(resumed)
        earlier = TrainingRecord.load(self.adapter_folder(resumed)) if resumed else None
        self.clock.earlier = earlier or TrainingRecord()
        if resumed is None:
            return
        self.gates = dict(self.clock.earlier.gates)
        self._take_up(self.clock.earlier)
        run = Path(cast(str, self.args.output_dir))
        saved = TrainingRecord.load(self.adapter_folder(run)) if resumed.resolve().parent == run.resolve() else None
        if saved is not None and saved.base_model == self.filled_record().base_model:
            self._take_up(saved)  # what was said and measured when training seemed to be over

    def _take_up(self, earlier: TrainingRecord) -> None:
        """Fill gaps of the record with what was there before a break; the adapter itself is to be measured anew."""
        record = self.record
        for name in ("language", "license", "pipeline_tag"):
            setattr(record, name, getattr(record, name) or getattr(earlier, name))
        record.tags = list(dict.fromkeys([*record.tags, *earlier.tags]))
        known = {result.place for result in record.results}
        record.results += [r for r in earlier.results if r.method != "adapter" and r.place not in known]

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = TrainingRecord.load(self.adapter_folder(cast(str, self.state.best_model_checkpoint)))
        if best is not None:  # what was measured is of the last weights, and these are others
            self._measured = {r.place: r for r in best.results if r.method == "adapter"}
            self.gates = best.gates

    def filled_record(self) -> TrainingRecord:
        """The record as it stands now."""
        model, args, record = self.peft_model, self.args, self.record
        config: Any = getattr(model, "config", None)
        record.trainer, record.tags = self._name, list(dict.fromkeys([*self._tags, *record.tags]))
        record.paper = asdict(self._paper) if self._paper else {}
        record.base_model = local(model.active_peft_config.base_model_name_or_path or None)
        record.base_model_revision = model.active_peft_config.revision or getattr(config, "_commit_hash", None)
        if not self.is_fsdp_enabled:  # there each process has a share of them
            record.trainable_parameters, record.total_parameters = model.get_nb_trainable_parameters()
        record.peak_memory = self.clock.peak_memory
        record.step_time, record.train_time = self.clock.step_time, self.clock.train_time
        record.gates = dict(self.gates)
        record.history = [numbers(entry) for entry in self.state.log_history if numbers(entry)]
        record.hyperparameters = without_places(hyperparameters(args))
        record.recipe = without_places(without_secrets(record.recipe, args.hub_token))
        record.command = command_line(args.hub_token)
        record.seeds = [args.seed]
        record.versions = versions()
        record.hardware = hardware(args.world_size, args.device)
        record.quantization = quantization(config)
        given = {r.place for r in record.results}
        measured = [result for result in self._measured.values() if result.place not in given]
        return replace(record, results=[*measured, *record.results])


class Clock(TrainerCallback):
    """Times steps and training, and looks at the memory."""

    def __init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=STEPS)
        self.earlier = TrainingRecord()  # of the run that a checkpoint is of
        self.total = 0.0
        self.peak: int | None = None
        self._began = self._step_began = 0.0

    @property
    def step_time(self) -> float | None:
        return statistics.median(self.steps) if self.steps else self.earlier.step_time

    @property
    def train_time(self) -> float | None:
        return (self.earlier.train_time or 0.0) + self.total if self.steps else self.earlier.train_time

    @property
    def peak_memory(self) -> int | None:
        return max((peak for peak in (self.peak, self.earlier.peak_memory) if peak is not None), default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.clear()
        self._began = time.perf_counter()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self._step_began)
        self.total = now - self._began
        self.peak = peak_memory(args.device)


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """What of a log entry belongs into a curve: the loss, its terms, metrics; nothing where there is only a step."""
    kept: dict[str, float] = {}
    for key, value in entry.items():
        other = key.startswith(("gates/", "train_", "total_")) or key.endswith(NOT_RESULTS)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not other:
            kept[key] = value
    return kept if kept.keys() - {"step", "epoch"} else {}
