"""The training record of a run, kept while it goes on: the source of its card."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_peft_ext.hub_cards import Result, TrainingRecord
from hf_peft_ext.hub_cards.metadata import check_metadata
from hf_peft_ext.hub_cards.record import quantization_of
from hf_peft_ext.hub_cards.redact import local, without_places, without_secrets
from hf_peft_ext.trainers.callbacks import Clock, GateLog
from hf_peft_ext.trainers.data_log import DataLog
from hf_peft_ext.trainers.run_info import command_line, hardware, hyperparameters, package_versions
from hf_peft_ext.validation.checks import check

NOT_RESULTS = ("_runtime", "_per_second", "_time", "_timestamp", "_entropy", "_num_tokens")


class Recorder(TrainerCallback):
    """Fills a `TrainingRecord` from a trainer, its log and its evaluations.

    Args:
        trainer: an adapter's trainer.
        gates: its log of gates.
    """

    def __init__(self, trainer: Any, gates: GateLog):
        self.trainer, self.gates = trainer, gates
        self.record = TrainingRecord()
        self.data, self.clock = DataLog(), Clock()
        self.measured: dict[tuple[Any, ...], Result] = {}  # of the adapter's current weights
        self.method = "adapter"  # whose results an evaluation gives

    # Results

    def add_training_data(self) -> None:
        """Describe the trainer's training data in the record."""
        self.data.add_to(self.record.datasets, self.trainer.train_dataset, "train", "train")

    def add_metrics(self, metrics: Mapping[str, float], prefix: str) -> None:
        """Note the metrics of an evaluation, whose names begin with `prefix`, as in `Trainer.evaluate`."""
        part, _, name = prefix.removeprefix("base_").partition("_")
        called = self.data.evaluated_name
        data = self.data.add_to(self.record.datasets, self.data.evaluated, called or name or part, "eval")
        dataset = data.name if data else None
        split = (data.split if data else None) or {"eval": "evaluation"}.get(part, part)
        if data and data.on_hub and called and called != split:  # several sets may be parts of this one
            split = f"{split} ({called})"
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and not key.endswith(NOT_RESULTS):
                metric = key.removeprefix(f"{prefix}_")
                result = Result(metric, float(value), method=self.method, dataset=dataset, split=split)
                if self.method == "adapter":
                    self.measured[result.place] = result
                else:
                    self.add_result(result)

    def add_result(self, result: Result) -> None:
        """Add a result to the record, in place of an earlier one of the same metric, method and data."""
        self.record.results = [*(r for r in self.record.results if r.place != result.place), result]

    def add_results(
        self,
        results: Mapping[str, float | Sequence[float]] | TrainingRecord,
        method: str,
        dataset: str | None,
        split: str | None,
    ) -> None:
        """Add results measured elsewhere, see `AdapterTrainerMixin.record_results`."""
        if isinstance(results, TrainingRecord):
            for result in results.results:
                if result.method == "adapter":
                    self.add_result(replace(result, method=method))
            return
        for metric, value in results.items():
            values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]
            check("results", {metric: value}, bool(values), "must have a value for each metric")
            spread = statistics.stdev(values) if len(values) > 1 else None
            place = (dataset, split)
            if place == (None, None):
                here = [(r.dataset, r.split) for r in self.measured.values() if r.metric == metric]
                place = here[-1] if here else place
            self.add_result(Result(metric, statistics.fmean(values), spread, len(values), method, *place))

    @contextmanager
    def measuring(self, method: str) -> Iterator[None]:
        """Attribute the results of evaluations to a method other than the adapter."""
        before, self.method = self.method, method
        try:
            yield
        finally:
            self.method = before

    # Saving and resuming

    def check(self) -> None:
        """Refuse metadata that the Hub would refuse.

        Raises:
            ValueError: the record's language, license, task or tags are invalid.
        """
        check_metadata({name: getattr(self.record, name) for name in ("language", "license", "pipeline_tag", "tags")})

    def save(self, folder: Path) -> None:
        """Write the record into an adapter's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.trainer.filled_record().save(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Continue the record of the checkpoint that training resumes from."""
        trainer, resumed = self.trainer, self.trainer.resumed
        earlier = (TrainingRecord.load(trainer.adapter_folder(resumed)) if resumed else None) or TrainingRecord()
        self.clock.resume(earlier.step_time, earlier.train_time, earlier.peak_memory)
        if resumed is None:
            return
        self.gates.means = dict(earlier.gates)
        self._fill_gaps(earlier)
        run = Path(args.output_dir)
        saved = TrainingRecord.load(trainer.adapter_folder(run)) if resumed.resolve().parent == run.resolve() else None
        if saved is not None and saved.base_model == trainer.filled_record().base_model:
            self._fill_gaps(saved)  # set and measured after an earlier end of training

    def _fill_gaps(self, earlier: TrainingRecord) -> None:
        """Take over what an earlier record has and this one lacks, except measurements of the adapter itself."""
        record = self.record
        for name in ("language", "license", "pipeline_tag"):
            setattr(record, name, getattr(record, name) or getattr(earlier, name))
        record.tags = list(dict.fromkeys([*record.tags, *earlier.tags]))
        present = {result.place for result in record.results}
        record.results += [r for r in earlier.results if r.method != "adapter" and r.place not in present]

    def use_results_of(self, folder: Path) -> None:
        """Take the adapter's results and gates from a checkpoint whose weights were just loaded."""
        stored = TrainingRecord.load(folder)
        if stored is not None:
            self.measured = {r.place: r for r in stored.results if r.method == "adapter"}
            self.gates.means = stored.gates

    def filled(self) -> TrainingRecord:
        """The record of the run so far."""
        trainer, record, clock = self.trainer, self.record, self.clock
        model, args = trainer.peft_model, trainer.args
        config: Any = getattr(model, "config", None)
        record.trainer, record.tags = trainer._name, list(dict.fromkeys([*trainer._tags, *record.tags]))
        record.paper = asdict(trainer._paper) if trainer._paper else {}
        record.base_model = local(model.active_peft_config.base_model_name_or_path or None)
        record.base_model_revision = model.active_peft_config.revision or getattr(config, "_commit_hash", None)
        if not trainer.is_fsdp_enabled:  # there each process has a share of the parameters
            record.trainable_parameters, record.total_parameters = model.get_nb_trainable_parameters()
        record.peak_memory, record.step_time, record.train_time = clock.peak_memory, clock.step_time, clock.train_time
        record.gates = dict(self.gates.means)
        record.history = [curve for entry in trainer.state.log_history if (curve := curve_values(entry))]
        record.hyperparameters = without_places(hyperparameters(args))
        record.recipe = without_places(without_secrets(record.recipe, args.hub_token))
        record.command = command_line(args.hub_token)
        record.seeds = [args.seed]
        record.versions = package_versions()
        record.hardware = hardware(args.world_size, args.device)
        record.quantization = quantization_of(config)
        places = {r.place for r in record.results}
        measured = [result for result in self.measured.values() if result.place not in places]
        return replace(record, results=[*measured, *record.results])


def curve_values(entry: Mapping[str, Any]) -> dict[str, float]:
    """The values of a log entry that belong in a curve: losses, their terms, metrics; empty if there are none."""
    kept: dict[str, float] = {}
    for key, value in entry.items():
        other = key.startswith(("gates/", "train_", "total_")) or key.endswith(NOT_RESULTS)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not other:
            kept[key] = value
    return kept if kept.keys() - {"step", "epoch"} else {}
