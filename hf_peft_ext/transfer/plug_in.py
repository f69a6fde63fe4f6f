"""All stages in one call: tune the small model, cut the bridge, train the plugged module, and see whether it gains."""

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..packing import bare
from ..placement import check
from ..structure import innermost
from .activations import check_weights
from .plugging import check_no_adapter, check_one_active, depths
from .projections import Order, layer_map
from .record import of_config, of_model, of_rows, remember
from .result import PlugInResult
from .settings import PlugInSettings
from .stages import Stages
from .task import Row, task_for


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
    """Tune a small model, plug the result into a large one without training that, and measure what it gains.

    Each stage leaves its artefact in `folder`; called again, it goes on with the stage that is missing:

        settings.json             what the run was given; a call with other rows or models is refused
        small/                    the small model's adapter
        decisions.json            what the small model answers to `unlabelled`
        importance.safetensors    what chose the bridge's channels
        activations/              of the large model, for a bridge with a ladder; can be deleted when it is plugged
        plugged/                  the module on the large model, folded
        refined/                  the same after MeZO
        result.json               `PlugInResult`
        adapter/                  the module at the scale that was chosen; only if there is a gain

    Args:
        small: a model with a trained adapter, or without any if there is a `peft_config`.
        large: the large model; no parameter of it is ever trained.
        tokenizer: of both: a pair whose vocabularies differ is read wrongly by one of them.
        train: rows, of `prompt`, `choices` and `answer`, or of `text` and `label` (see `task`).
        test: rows that nothing is chosen by, two at least: the gain is measured on them.
        folder: for the artefacts.
        peft_config: the adapter that the small model is given.
        dev: rows that the scale is chosen by; None for a fifth of `train`, held out.
        settings: the rest.
        progress: whether bars are shown.
        unlabelled: rows as those of `train`, but without answers: the tuned small model gives each answer a
            probability (see `decide`), and bridge and refinement train towards these as well as on the answers of
            `train`, all rows alike. An answer that such a row does have is not looked at.

    Returns:
        The large model with the module at the chosen scale (disabled where there is no gain), and the result.

    Raises:
        TypeError: `small` has no adapter and there is no `peft_config`, or one of a kind that cannot be plugged in, or
            `large` has one.
        ValueError: a row lacks what it must have, there are too few, no stage would train on `unlabelled`, `folder`
            holds a run with other settings, rows or models, or the models do not fit each other or the tokenizer.
    """
    settings = settings or PlugInSettings()
    train, test, unlabelled, folder = list(train), list(test), list(unlabelled or ()), Path(folder)
    dev = None if dev is None else list(dev)
    task = task_for(tokenizer, [*train, *(dev or ()), *test, *unlabelled])
    task.answers([*train, *(dev or ()), *test])  # raises where there is none
    idle = settings.bridge == settings.refine == "none"
    rule = "would train nothing: the settings have neither a bridge nor a refinement"
    check("unlabelled", len(unlabelled), not (unlabelled and idle), rule)
    if dev is None:
        rows = random.Random(settings.seed).sample(train, len(train))
        dev, train = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    for name, rows, least in (("train", train, 1), ("dev", dev, 1), ("test", test, 2)):
        check(name, len(rows), len(rows) >= least, f"must hold rows, {least} at least")
    check_models(small, large, tokenizer, peft_config, settings.order)
    answered = (*task.asks, task.answer, "target")
    rows = {name: of_rows(rows, answered) for name, rows in (("train", train), ("dev", dev), ("test", test))}
    rows["unlabelled"] = of_rows(unlabelled, task.asks)
    models = {"small": of_model(small), "large": of_model(large), "peft_config": of_config(small, peft_config)}
    remember(folder, {**asdict(settings), **rows, **models})
    columns = TextColumn("{task.description:<12}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not progress) as bars:
        stages = Stages(folder, settings, task, train, bars)
        tuned = stages.small(small, peft_config)
        if unlabelled:
            stages.decided = stages.decisions(tuned, unlabelled)
        model = stages.plugged(tuned, large)
        if settings.refine != "none":
            model = stages.refined(model)
        result = stages.measured(model, dev, test)
    return model, result


def check_models(
    small: nn.Module, large: nn.Module, tokenizer: PreTrainedTokenizerBase, config: PeftConfig | None, order: Order
) -> None:
    """Refuse models that cannot be a pair, before anything is trained."""
    if not isinstance(small, PeftModel) and config is None:
        raise TypeError("`small` must be a PeftModel, or `peft_config` say which adapter to train on it.")
    if isinstance(small, PeftModel):
        check_one_active(small)
    check_no_adapter(large)
    check_weights("large", large, "its answers are measured")
    layer_map(depths(bare(small)), depths(large), order)
    for name, model in (("small", small), ("large", large)):
        embedding: Any = innermost(bare(model).get_input_embeddings())
        known = len(embedding.weight)
        rule = f"must have no more tokens than `{name}` ({known}): both models need the tokenizer's vocabulary"
        check("tokenizer", tokenizer.vocab_size, tokenizer.vocab_size <= known, rule)
