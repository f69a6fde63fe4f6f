"""The record of a training run that its card shows, kept as JSON beside the adapter."""

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from math import sqrt
from pathlib import Path
from statistics import fmean, median
from typing import Any

from peft import PeftModel

from hf_peft_ext.hub_cards.record_json import read_as, without_nan
from hf_peft_ext.validation.checks import check

RECORD_FILE = "training_record.json"


@dataclass
class Result:
    """One measured number.

    Args:
        metric: its name, such as "accuracy".
        value: the number; the mean if there are several runs.
        spread: sample standard deviation over runs; None for a single run.
        runs: the number of runs.
        method: what was measured: "adapter" (this one), "base" (without it), "lora" (a LoRA baseline)...
        dataset: the data of the measurement, a Hub id or a name.
        split: the part of the data.
    """

    metric: str
    value: float
    spread: float | None = None
    runs: int = 1
    method: str = "adapter"
    dataset: str | None = None
    split: str | None = None

    @property
    def place(self) -> tuple[str | None, ...]:
        """Metric, method, dataset and split; results with the same place can be combined."""
        return (self.metric, self.method, self.dataset, self.split)


@dataclass
class DatasetRecord:
    """A dataset that was used for training or evaluation.

    Args:
        name: a Hub id, or a name for local data.
        config: its configuration on the Hub.
        split: the part that was used.
        rows: the number of examples.
        revision: the commit on the Hub.
        fingerprint: of `datasets.Dataset`, which changes with the content.
        on_hub: whether `name` is a Hub id.
        used_for: "train" or "eval"; None if unknown.
    """

    name: str
    config: str | None = None
    split: str | None = None
    rows: int | None = None
    revision: str | None = None
    fingerprint: str | None = None
    on_hub: bool = False
    used_for: str | None = None


@dataclass
class TrainingRecord:
    """A training run. What was not measured is None or empty.

    Args:
        base_model: Hub id (or path) of the base model.
        base_model_revision: its commit.
        datasets: the data.
        labels: names of the classes, in order.
        results: the numbers measured, baselines included.
        trainable_parameters: how many parameters were trained.
        total_parameters: how many the model has, the adapter included.
        peak_memory: bytes: of the GPU if there is one, else of the process.
        step_time: median seconds of an optimizer step.
        train_time: seconds of the whole training.
        gates: LAYER.SUBLAYER, as `gate_values` names them -> mean gate over an evaluation batch.
        history: the log, one entry a logging step: {"step": ..., "loss": ..., terms of the loss...}.
        loss_terms: the names of the loss terms in `history`.
        hyperparameters: the training arguments that differ from their defaults, without secrets.
        recipe: the run as a recipe for `hf-peft-ext train`; empty if it was not started from one.
        command: the command line, without secrets.
        seeds: the seed of each run.
        versions: package -> version.
        hardware: processor or GPU, and how many.
        quantization: of the base model, such as "4-bit NF4, double quantisation"; None if there is none.
        language: ISO 639-1 codes.
        license: identifier on the Hub, such as "apache-2.0".
        pipeline_tag: the Hub's task, such as "text-classification".
        trainer: the trainer's name, such as "SFT".
        paper: of the training method, with `title`, `arxiv` and `bibtex`; empty if it has no paper of its own.
        tags: the trainer's tags for the Hub.
        exported_from: the PEFT type of the adapter that a LoRA was exported from; None if it was trained itself.
        export: what the export lost, by name (see `hf_peft_ext.to_lora`).
    """

    base_model: str | None = None
    base_model_revision: str | None = None
    datasets: list[DatasetRecord] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    peak_memory: int | None = None
    step_time: float | None = None
    train_time: float | None = None
    gates: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    loss_terms: list[str] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    seeds: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None
    quantization: str | None = None
    language: list[str] = field(default_factory=list)
    license: str | None = None
    pipeline_tag: str | None = None
    trainer: str | None = None
    paper: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    exported_from: str | None = None
    export: dict[str, float] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write the record into the adapter's folder; numbers that are not finite become null.

        Returns:
            The path of the file.
        """
        path = Path(folder) / RECORD_FILE
        content = json.dumps(without_nan(asdict(self)), indent=2, allow_nan=False)
        path.write_text(content + "\n", encoding="utf-8")
        return path

    def filled_from(self, model: PeftModel) -> "TrainingRecord":
        """A copy with fields that only the live model knows, if they are empty: class names, quantization."""
        config: Any = getattr(model, "config", None)
        fields = {"labels": class_names(config), "quantization": quantization_of(config)}
        return replace(self, **{name: v for name, v in fields.items() if v and not getattr(self, name)})

    @classmethod
    def merge(cls, records: Sequence["TrainingRecord"]) -> "TrainingRecord":
        """The first of several records, with the mean and the spread of all their results.

        Args:
            records: of runs that differ in their seeds.

        Raises:
            ValueError: there is no record, or they have different base models or numbers of parameters.
        """
        check("records", records, len(records) > 0, "must hold at least one record")
        for name in ("base_model", "trainable_parameters"):
            values = {getattr(record, name) for record in records}
            check(name, sorted(map(str, values)), len(values) == 1, "must be the same in all records")
        places: dict[tuple[str | None, ...], list[Result]] = {}
        for result in (result for record in records for result in record.results):
            places.setdefault(result.place, []).append(result)
        shared = set(records[0].gates).intersection(*(record.gates for record in records))
        times = [record.train_time for record in records if record.train_time is not None]
        steps = [record.step_time for record in records if record.step_time is not None]
        return replace(
            deepcopy(records[0]),
            results=[pooled(results) for results in places.values()],
            seeds=[seed for record in records for seed in record.seeds],
            gates={name: fmean(record.gates[name] for record in records) for name in sorted(shared)},
            peak_memory=max((record.peak_memory for record in records if record.peak_memory), default=None),
            train_time=fmean(times) if times else None,
            step_time=median(steps) if steps else None,
        )

    @classmethod
    def load(cls, folder: str | Path) -> "TrainingRecord | None":
        """The record in an adapter's folder; None if there is none.

        Raises:
            ValueError: the file is not a record; the message names the field.
        """
        path = Path(folder) / RECORD_FILE
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
            raise ValueError(f"{path} is not JSON: {error}.") from error
        return read_as(cls, stored, RECORD_FILE)


def class_names(config: Any) -> list[str]:
    """The names of the classes in a model's config, in order; empty if they are transformers' defaults."""
    names = getattr(config, "id2label", None) or {}
    ordered = [str(names[i]) for i in sorted(names)] if isinstance(names, dict) else []
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in ordered) else ordered


def quantization_of(config: Any) -> str | None:
    """The storage of a model's weights, such as "4-bit NF4, double quantisation"; None if they are not quantized."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    if settings.get("load_in_4bit"):
        double = ", double quantisation" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"4-bit {str(settings.get('bnb_4bit_quant_type')).upper()}{double}"
    return "8-bit" if settings.get("load_in_8bit") else str(settings.get("quant_method"))


def pooled(results: Sequence[Result]) -> Result:
    """Results of one place as a single one: the mean and the sample standard deviation over all their runs."""
    runs = sum(result.runs for result in results)
    mean = sum(result.runs * result.value for result in results) / runs
    complete = all(result.runs == 1 or result.spread is not None for result in results)
    squares = sum(r.runs * (r.value - mean) ** 2 + (r.runs - 1) * (r.spread or 0.0) ** 2 for r in results)
    return replace(
        results[0], value=mean, runs=runs, spread=sqrt(squares / (runs - 1)) if complete and runs > 1 else None
    )
