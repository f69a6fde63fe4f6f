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

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
    """.split()
)
# ISO 639-1; the Hub also takes ISO 639-2 and 639-3 codes, of three letters, which are too many to list
LANGUAGES = frozenset(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st
    su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """.split()
)
# https://huggingface.co/tasks
HUB_TASKS = frozenset(
    """
    text-classification token-classification table-question-answering question-answering zero-shot-classification
    translation summarization feature-extraction text-generation fill-mask sentence-similarity text-ranking
    text-to-speech text-to-audio automatic-speech-recognition audio-to-audio audio-classification
    audio-text-to-text voice-activity-detection depth-estimation image-classification object-detection
    image-segmentation text-to-image image-to-text image-to-image image-to-video unconditional-image-generation
    video-classification reinforcement-learning robotics tabular-classification tabular-regression
    tabular-to-text table-to-text multiple-choice text-retrieval time-series-forecasting text-to-video
    image-text-to-text visual-question-answering document-question-answering zero-shot-image-classification
    graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d image-feature-extraction
    video-text-to-text keypoint-detection visual-document-retrieval any-to-any video-to-video other
    """.split()
)
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
    needed = ["hf_peft_ext"] * adapter.is_ours + ["transformers"] * bool(auto_class(adapter))
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
        near = nearest(str(license).lower().replace(" ", "-"), LICENSES, cutoff=0.5)
        hint = f"; did you mean {near!r}?" if near else ""
        valid = isinstance(license, str) and license in LICENSES
        check("license", license, valid, f"must be an identifier of the Hub, such as 'mit'{hint}")
    for language in as_list(data.get("language")):
        listed = isinstance(language, str) and language in LANGUAGES | {"code", "multilingual"}
        hint = "; in YAML, write no as 'no'" if language is False else ""
        valid = listed or bool(re.fullmatch("[a-z]{3}", str(language)))
        check("language", language, valid, f"must be an ISO 639 code, such as 'en'{hint}")
    for name in ("base_model", "datasets"):
        for repo_id in as_list(data.get(name)):
            check(name, repo_id, is_hub_id(repo_id), "must be an id on the Hub, such as 'org/name'")
    task = data.get("pipeline_tag")
    valid = task is None or (isinstance(task, str) and task in HUB_TASKS)
    check("pipeline_tag", task, valid, "must be a task of the Hub: huggingface.co/tasks")
    for tag in as_list(data.get("tags")):
        check("tags", tag, isinstance(tag, str) and tag == single_line(tag) != "", "must be words on one line")
    read = yaml.safe_load(yaml_dump(dict(data)))
    check("metadata", dict(data), read == dict(data), "must be the same after it was written as YAML and read again")


def as_list(value: Any) -> list[Any]:
    """A field with one value or several as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
