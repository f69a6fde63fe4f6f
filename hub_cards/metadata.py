"""The metadata of a card, by which the Hub indexes an adapter; checked by the Hub's rules before a push."""

import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump

from hf_peft_ext.hub_cards.markdown import single_line
from hf_peft_ext.hub_cards.record import DatasetRecord, Result, TrainingRecord
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter
from hf_peft_ext.hub_cards.snippet import auto_class, pipeline_tag
from hf_peft_ext.validation.checks import check, is_hub_id
from hf_peft_ext.validation.suggestions import nearest

# field -> the values that the Hub accepts; without YAML's types, for which the language `no` is False
HUB_FILE = Path(__file__).with_name("hub_values.yaml").read_text("utf-8")
HUB_VALUES = {name: frozenset(text.split()) for name, text in yaml.load(HUB_FILE, yaml.BaseLoader).items()}
METRIC = re.compile(r"(?!loss$)[a-z0-9][a-z0-9_\-]*(/[a-z0-9_\-]+)?")  # the Hub has no metric for losses


def card_data(adapter: SavedAdapter, record: TrainingRecord, name: str) -> ModelCardData:
    """The metadata of an adapter and its training record.

    Args:
        adapter: the saved adapter.
        record: of its training.
        name: of the adapter on the Hub's leaderboards.

    Raises:
        ValueError: the Hub would refuse a value.
    """
    base = base_model(adapter, record)
    task = record.pipeline_tag or pipeline_tag(adapter)
    results = eval_results(record, task)
    own = [result for result in record.results if result.method == "adapter"]
    data = {
        "language": record.language or None,
        "license": record.license,
        "library_name": "peft",
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "tags": tags(adapter, record, base),
        "pipeline_tag": task,
        "datasets": list(dict.fromkeys(d.name for d in record.datasets if d.on_hub and d.used_for != "eval")) or None,
        "metrics": list(dict.fromkeys(r.metric for r in own if METRIC.fullmatch(r.metric))) or None,
    }
    check_metadata({key: value for key, value in data.items() if value is not None})
    return ModelCardData(**data, **({"model_name": name, "eval_results": results} if results else {}))


def base_model(adapter: SavedAdapter, record: TrainingRecord) -> str | None:
    """The base model's id on the Hub; None if it was loaded from a folder."""
    name = record.base_model or adapter.config.base_model_name_or_path
    return name if is_hub_id(name) and not Path(name).exists() else None


def tags(adapter: SavedAdapter, record: TrainingRecord, base: str | None) -> list[str]:
    """peft's tags, the method, the trainer's tags, and this package if loading needs it."""
    needed = ["hf_peft_ext"] * (adapter.is_ours or adapter.reads_mean) + ["transformers"] * bool(auto_class(adapter))
    named = [f"base_model:adapter:{base}"] * bool(base)
    return list(dict.fromkeys(["peft", *needed, adapter.method, *record.tags, *named]))


def eval_results(record: TrainingRecord, task: str | None) -> list[EvalResult]:
    """The adapter's own results on data of the Hub, which lists results by dataset id and task."""
    on_hub = {data.name: data for data in record.datasets if data.on_hub}
    own = [r for r in record.results if r.method == "adapter" and r.dataset in on_hub and isfinite(r.value)]
    return [eval_result(r, on_hub[str(r.dataset)], task) for r in own if task and METRIC.fullmatch(r.metric)]


def eval_result(result: Result, data: DatasetRecord, task: str | None) -> EvalResult:
    """A result in the form of the model-index."""
    return EvalResult(
        task_type=str(task),
        dataset_type=data.name,
        dataset_name=data.name,
        dataset_config=single_line(data.config) if data.config else None,
        dataset_split=single_line(result.split) if result.split else None,
        dataset_revision=single_line(data.revision) if data.revision else None,
        metric_type=result.metric,
        metric_value=result.value,
    )


def check_metadata(data: Mapping[str, Any]) -> None:
    """Refuse metadata that the Hub would refuse or index wrongly.

    Args:
        data: field -> value.

    Raises:
        ValueError: the value of a field is invalid.
    """
    for license in as_list(data.get("license")):
        near = nearest(str(license).lower().replace(" ", "-"), HUB_VALUES["license"], cutoff=0.5)
        hint = f"; did you mean {near!r}?" if near else ""
        valid = isinstance(license, str) and license in HUB_VALUES["license"]
        check("license", license, valid, f"must be an identifier of the Hub, such as 'mit'{hint}")
    for language in as_list(data.get("language")):
        listed = isinstance(language, str) and language in HUB_VALUES["language"]
        hint = "; in YAML, write no as 'no'" if language is False else ""
        valid = listed or bool(re.fullmatch("[a-z]{3}", str(language)))
        check("language", language, valid, f"must be an ISO 639 code, such as 'en'{hint}")
    for name in ("base_model", "datasets"):
        for repo_id in as_list(data.get(name)):
            check(name, repo_id, is_hub_id(repo_id), "must be an id on the Hub, such as 'org/name'")
    task = data.get("pipeline_tag")
    valid = task is None or (isinstance(task, str) and task in HUB_VALUES["pipeline_tag"])
    check("pipeline_tag", task, valid, "must be a task of the Hub: huggingface.co/tasks")
    for tag in as_list(data.get("tags")):
        check("tags", tag, isinstance(tag, str) and tag == single_line(tag) != "", "must be words on one line")
    read = yaml.safe_load(yaml_dump(dict(data)))
    check("metadata", dict(data), read == dict(data), "must be the same after it was written as YAML and read again")


def as_list(value: Any) -> list[Any]:
    """A field with one value or several as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
