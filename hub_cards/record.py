"""What a training run knows and its card shows: a plain record, kept as JSON beside the adapter."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from math import isfinite, nan, sqrt
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args, get_origin

from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.config_schema import fits, refuse, type_hints

FILE = "training_record.json"


@dataclass
class Result:
    """One measured number.

    Args:
        metric: its name, such as "accuracy".
        value: the number; the mean where there are several runs.
        spread: standard deviation over runs; None for a single run.
        runs: how many runs it is the mean of.
        method: what was measured: "adapter" (this one), "base" (the untouched model), "lora" (a LoRA baseline)...
        dataset: the data it was measured on, a Hub id or a name.
        split: which part of it.
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
        """Metric, method, data set and split; results of equal places can be combined."""
        return (self.metric, self.method, self.dataset, self.split)


@dataclass
class DatasetRecord:
    """One set of data that was trained or evaluated on.

    Args:
        name: a Hub id, or a name where the data is local.
        config: its configuration on the Hub.
        split: which part.
        rows: how many examples.
        revision: the commit on the Hub.
        fingerprint: that of `datasets.Dataset`, which changes with the content.
        on_hub: whether `name` is a Hub id.
        used_for: "train" or "eval"; None where that is not known.
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
    """A training run as its card tells it. What was not measured is None or empty.

    Args:
        base_model: Hub id (or path) of the base model.
        base_model_revision: the commit it was loaded at.
        datasets: the data.
        labels: names of the classes, in order.
        results: the numbers measured, baselines included.
        trainable_parameters: how many were trained.
        total_parameters: how many the model has, the adapter included.
        peak_memory: the most memory in use, in bytes: of the GPU where there is one, else of the process.
        step_time: median seconds of one optimiser step.
        train_time: seconds of the whole training.
        gates: layer and sub-layer, as `gate_values` names them -> mean gate over an evaluation batch.
        history: the log, one entry a logging step: {"step": ..., "loss": ..., terms of the loss...}.
        loss_terms: what the terms of the loss are called there.
        hyperparameters: the training arguments that differ from their defaults, without secrets.
        recipe: the run as a recipe for `hf-peft-ext train`; empty if it was not started from one.
        command: the command line, without secrets.
        seeds: the seed of each run.
        versions: package -> version.
        hardware: processor or GPU, and how many.
        quantization: of the base model, such as "4-bit NF4, double quantisation"; None without.
        language: ISO 639-1 codes.
        license: identifier on the Hub, such as "apache-2.0".
        pipeline_tag: the Hub's task, such as "text-classification".
        trainer: the name of the trainer, such as "SFT".
        paper: of the way it was trained, with `title`, `arxiv` and `bibtex`; empty where that has none of its own.
        tags: of the trainer, for the Hub.
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

    def save(self, folder: str | Path) -> Path:
        """Write the record into the adapter's folder. Numbers that are not finite become null: JSON has none."""
        path = Path(folder) / FILE
        content = json.dumps(finite(asdict(self)), indent=2, allow_nan=False)
        path.write_text(content + "\n", encoding="utf-8")
        return path

    @classmethod
    def merge(cls, records: Sequence["TrainingRecord"]) -> "TrainingRecord":
        """One record of several runs of a recipe: the first one's, with mean and spread of what they all measured.

        Args:
            records: of runs that differ in their seeds.

        Raises:
            ValueError: there are none, or they are of different base models or numbers of parameters.
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
        """The record of an adapter's folder, or None where there is none.

        Raises:
            ValueError: the file is not a record; the message names the field.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
            raise ValueError(f"{path} is not JSON: {error}.") from error
        return read_as(cls, stored)


def finite(value: Any) -> Any:
    """A copy of JSON-like data with None in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def read_as(kind: Any, value: Any, name: str = "") -> Any:
    """What JSON holds as a field's type, dataclasses included; `name` is the field.

    Raises:
        ValueError: it is of another type; of a dataclass, a field is not known or missing.
    """
    of = next(iter(get_args(kind)), None)
    if is_dataclass(of) and isinstance(value, list):
        return [read_as(of, entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    if not (isinstance(kind, type) and is_dataclass(kind)):
        value = with_nan(kind, value)
        if not fits(value, kind):
            refuse(name, value, f"in {FILE} must be of type {getattr(kind, '__name__', kind)}")
        return value
    check(name or FILE, value, isinstance(value, dict), "must hold one JSON object")
    names = {f.name for f in fields(kind)}
    unknown = sorted(set(value) - names)
    check(name or FILE, unknown, not unknown, f"has fields that are not among {', '.join(sorted(names))}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    missing = [field for field in needed if field not in value]
    check(name or FILE, missing, not missing, "must be there")
    inside, hints = f"{name}." if name else "", type_hints(kind)
    return kind(**{key: read_as(hints[key], entry, f"{inside}{key}") for key, entry in value.items()})


def with_nan(kind: Any, value: Any) -> Any:
    """NaN where a number was not finite when it was written."""
    if kind is float:
        return nan if value is None else value
    of = get_args(kind)
    if get_origin(kind) is list and isinstance(value, list):
        return [with_nan(of[0], item) for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: with_nan(of[1], item) for key, item in value.items()}
    return value


def pooled(results: Sequence[Result]) -> Result:
    """Results of the same place as one: over all their runs, the mean and the sample standard deviation."""
    runs = sum(result.runs for result in results)
    mean = sum(result.runs * result.value for result in results) / runs
    known = all(result.runs == 1 or result.spread is not None for result in results)
    squares = sum(r.runs * (r.value - mean) ** 2 + (r.runs - 1) * (r.spread or 0.0) ** 2 for r in results)
    return replace(
        results[0], value=mean, runs=runs, spread=sqrt(squares / (runs - 1)) if known and runs > 1 else None
    )
