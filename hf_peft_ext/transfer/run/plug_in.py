"""All stages in one call: tune the small model, prune the bridge, train the plugged adapter, measure the gain."""

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_peft_ext.model.structure import innermost
from hf_peft_ext.ranking.packing import bare
from hf_peft_ext.transfer.bridges.activations import check_has_weights
from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensors
from hf_peft_ext.transfer.map.plug import check_no_adapter, depths
from hf_peft_ext.transfer.map.projections import Order, layer_map
from hf_peft_ext.transfer.run.fingerprint import (
    adapter_config_fingerprint,
    model_fingerprint,
    record_inputs,
    rows_fingerprint,
)
from hf_peft_ext.transfer.run.pipeline import Stages
from hf_peft_ext.transfer.run.result import PlugInResult
from hf_peft_ext.transfer.run.settings import PlugInSettings
from hf_peft_ext.transfer.run.task import Row, Task, task_for
from hf_peft_ext.validation.checks import check


def plug_in(
    small: nn.Module,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Row],
    test: Sequence[Row],
    folder: str | Path,
    peft_config: PeftConfig | None = None,
    dev: Sequence[Row] | None = None,
    settings: PlugInSettings | None = None,
    progress: bool = True,
    unlabelled: Sequence[Row] | None = None,
) -> tuple[PeftModel, PlugInResult]:
    """Tune a small model, plug its adapter into a large model that is not trained, and measure the gain.

    Each stage writes its artefact into `folder`. Called again, `plug_in` continues with the stage that is missing:

        settings.json             the settings, and digests of rows and models; a call with others is refused
        small/                    the small model's adapter
        decisions.json            the small model's probabilities for `unlabelled`
        importance.safetensors    the scores that chose the bridge's channels
        activations/              of the large model, for a bridge with a ladder; not needed after `plugged/`
        plugged/                  the adapter on the large model, merged
        refined/                  the same after MeZO
        result.json               `PlugInResult`
        adapter/                  the adapter at the chosen scale; only if there is a gain

    Args:
        small: a model with one active adapter that is trained, or without adapters if there is a `peft_config`.
        large: the large model; none of its parameters is trained.
        tokenizer: of both models, which need the same vocabulary.
        train: rows with `prompt`, `choices` and `answer`, or with `text` and `label`.
        test: at least two rows, which measure the gain and choose nothing.
        folder: for the artefacts.
        peft_config: the config of the small model's adapter.
        dev: rows that choose the scale; None for a fifth of `train`, held out.
        settings: the length of each stage, and the choices that the paper leaves open.
        progress: whether bars are shown.
        unlabelled: rows like those of `train`, whose answers are not read. The tuned small model gives each answer a
            probability (see `decide`), and bridge and refinement train on these soft labels too.

    Returns:
        The large model with the adapter at the chosen scale (disabled where there is no gain), and the result.

    Raises:
        TypeError: `small` has no adapter and there is no `peft_config`, or an adapter of a kind that cannot be plugged
            in, or `large` has an adapter.
        ValueError: several adapters are active, a row lacks a field, there are too few rows, no stage would train on
            `unlabelled`, `folder` holds a run with other settings, rows or models, or the models do not fit each other
            or the tokenizer.
    """
    settings, folder = settings or PlugInSettings(), Path(folder)
    task = task_for(tokenizer, [*train, *(dev or ()), *test, *(unlabelled or ())])
    splits = split_rows(task, settings, train, dev, test, unlabelled or ())
    check_models(small, large, tokenizer, peft_config, settings.order)
    tuned = AdapterTensors(small) if isinstance(small, PeftModel) else None
    answered = (*task.asks, task.answer, "target")
    names = {"train": answered, "dev": answered, "test": answered, "unlabelled": task.asks}
    rows = {name: rows_fingerprint(splits[name], fields) for name, fields in names.items()}
    models = {
        "small": model_fingerprint(small, tuned),
        "large": model_fingerprint(large),
        "peft_config": adapter_config_fingerprint(small, peft_config),
    }
    record_inputs(folder, {**asdict(settings), **rows, **models})
    columns = TextColumn("{task.description:<12}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not progress) as bars:
        stages = Stages(folder, settings, task, splits["train"], bars)
        tuned = tuned or stages.small(small, peft_config)
        if splits["unlabelled"]:
            stages.soft_labels = stages.decisions(tuned.model, splits["unlabelled"])
        plugged = stages.plugged(tuned, large)
        if settings.refine != "none":
            plugged = stages.refined(plugged)
        result = stages.measured(plugged, splits["dev"], splits["test"])
    return plugged.model, result


def split_rows(
    task: Task,
    settings: PlugInSettings,
    train: Sequence[Row],
    dev: Sequence[Row] | None,
    test: Sequence[Row],
    unlabelled: Sequence[Row],
) -> dict[str, list[Row]]:
    """The rows of each part; a fifth of `train` is held out where there is no `dev`.

    Raises:
        ValueError: a row has no answer, a part has too few rows, or no stage would train on `unlabelled`.
    """
    task.answers([*train, *(dev or ()), *test])  # raises for a row without one
    idle = settings.bridge == settings.refine == "none"
    rule = "would not be trained on: the settings have neither a bridge nor a refinement"
    check("unlabelled", len(unlabelled), not (unlabelled and idle), rule)
    if dev is None:
        shuffled = random.Random(settings.seed).sample(list(train), len(train))
        dev, train = shuffled[: len(shuffled) // 5], shuffled[len(shuffled) // 5 :]
    splits = {"train": list(train), "dev": list(dev), "test": list(test), "unlabelled": list(unlabelled)}
    for name, least in (("train", 1), ("dev", 1), ("test", 2)):
        check(name, len(splits[name]), len(splits[name]) >= least, f"must hold rows, {least} at least")
    return splits


def check_models(
    small: nn.Module, large: nn.Module, tokenizer: PreTrainedTokenizerBase, config: PeftConfig | None, order: Order
) -> None:
    """Refuse models that cannot be a pair, before anything is trained."""
    if not isinstance(small, PeftModel) and config is None:
        raise TypeError("`small` must be a PeftModel, or `peft_config` must be the config of its adapter.")
    if isinstance(small, PeftModel):
        active = list(small.active_adapters)
        rule = "must be one, whose scale is chosen; `plug` carries several, `add_weighted_adapter` merges LoRAs"
        check("active_adapters", active, len(active) == 1, rule)
    check_no_adapter(large)
    check_has_weights("large", large, "its answers are measured")
    layer_map(depths(bare(small)), depths(large), order)
    for name, model in (("small", small), ("large", large)):
        embedding: Any = innermost(bare(model).get_input_embeddings())
        size = len(embedding.weight)
        rule = f"must have no more tokens than `{name}` ({size}): both models need the tokenizer's vocabulary"
        check("tokenizer", tokenizer.vocab_size, tokenizer.vocab_size <= size, rule)
