"""All stages in one call: tune the small model, cut the bridge, train the plugged module, and see whether it gains."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..placement import check
from .result import PlugInResult
from .settings import PlugInSettings
from .stages import Stages
from .task import Row, task_for

SETTINGS = "settings.json"


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
        tokenizer: of both.
        train: rows, of `prompt`, `choices` and `answer`, or of `text` and `label` (see `task`).
        test: rows that nothing is chosen by: the gain is measured on them.
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
        TypeError: `small` has no adapter and there is no `peft_config`.
        ValueError: a row lacks what it must have, no stage would train on `unlabelled`, `folder` holds a run with
            other settings or other such rows, or the models do not fit.
    """
    settings = settings or PlugInSettings()
    unlabelled, folder = list(unlabelled or ()), Path(folder)
    task = task_for(tokenizer, [*train, *(dev or ()), *test, *unlabelled])
    task.answers([*train, *(dev or ()), *test])  # raises where there is none
    idle = settings.bridge == settings.refine == "none"
    rule = "would train nothing: the settings have neither a bridge nor a refinement"
    check("unlabelled", len(unlabelled), not (unlabelled and idle), rule)
    if dev is None:
        rows = random.Random(settings.seed).sample(train, len(train))
        dev, train = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    check("dev", len(dev), len(dev) > 0, "must hold at least one row")
    remember(folder, {**asdict(settings), "unlabelled": len(unlabelled)})
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


def remember(folder: Path, given: dict[str, Any]) -> None:
    """Write the settings down, or compare them with those of the run that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.exists():
        present = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(name for name in given if given[name] != present.get(name))
        check("folder", str(folder), not other, f"holds a run with other settings: {', '.join(other)}")
    path.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
