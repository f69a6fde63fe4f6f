"""The result of an export, and the training record that the LoRA's card is made of."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from hf_peft_ext.export.fidelity import Fidelity
from hf_peft_ext.hub_cards.record import Result, TrainingRecord

RECORD_FIELDS = (
    "base_model",
    "base_model_revision",
    "labels",
    "datasets",
    "language",
    "license",
    "pipeline_tag",
    "quantization",
)


@dataclass(frozen=True)
class Export:
    """An exported LoRA.

    Args:
        folder: where it is.
        peft_type: of the adapter that it was made from.
        r: its rank.
        exact: whether it equals the adapter, up to rounding.
        fidelity: how close it is to the adapter; None for an exact export without texts.
        texts: number of texts that it was distilled on; 0 for an exact export.
        steps: training steps.
        seconds: time of the whole export.
    """

    folder: Path
    peft_type: str
    r: int
    exact: bool
    fidelity: Fidelity | None
    texts: int
    steps: int
    seconds: float


def with_export(record: TrainingRecord, export: Export, model: PeftModel) -> TrainingRecord:
    """The record of a LoRA.

    Args:
        record: of the adapter; its base model, data and labels are kept.
        export: the LoRA.
        model: the model that it was made in.
    """
    lost, config = export.fidelity, model.active_peft_config
    numbers: dict[str, Any] = {"exact": float(export.exact), "texts": export.texts, "steps": export.steps}
    results: list[Result] = []
    if lost is not None:
        names = ("rows", "kl", "kl_base", "agreement", "agreement_base")
        numbers |= {name: value for name in names if (value := getattr(lost, name)) is not None}
        for score in lost.scores:
            models = {"adapter": score.lora, "original": score.adapter, "base": score.base}
            results += [Result(score.metric, of.value, method=method) for method, of in models.items()]
            numbers |= {f"{score.metric} {end}": getattr(score.lora, end) for end in ("low", "high")}
            change = score.difference
            numbers |= {f"{score.metric} difference{end}": getattr(change, name)
                        for end, name in (("", "value"), (" low", "low"), (" high", "high"))}  # fmt: skip
    kept = {name: getattr(record, name) for name in RECORD_FIELDS}
    plain = TrainingRecord(**kept, results=results, train_time=export.seconds if export.steps else None)
    named = {"base_model": record.base_model or config.base_model_name_or_path}
    return replace(plain, **named, exported_from=export.peft_type, export={k: float(v) for k, v in numbers.items()})
