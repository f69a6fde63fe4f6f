"""What a model in memory tells of itself that its saved adapter does not."""

import re
from dataclasses import replace
from typing import Any

from peft import PeftModel

from hf_peft_ext.hub_cards.record import TrainingRecord


def told_by(model: PeftModel, record: TrainingRecord) -> TrainingRecord:
    """The record with its gaps filled: the names of the classes, the quantisation."""
    config: Any = getattr(model, "config", None)
    gaps: dict[str, Any] = {
        "labels": labels(config),
        "quantization": quantization(config),
    }
    return replace(record, **{name: value for name, value in gaps.items() if value and not getattr(record, name)})


def labels(config: Any) -> list[str]:
    """The classes in order, where somebody has named them."""
    names = getattr(config, "id2label", None) or {}
    given = [str(names[i]) for i in sorted(names)] if isinstance(names, dict) else []
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in given) else given


def quantization(config: Any) -> str | None:
    """How the base model's weights are stored, such as "4-bit NF4, double quantisation"; None where they are whole."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    found = stored if isinstance(stored, dict) else stored.to_dict()
    if found.get("load_in_4bit"):
        double = ", double quantisation" if found.get("bnb_4bit_use_double_quant") else ""
        return f"4-bit {str(found.get('bnb_4bit_quant_type')).upper()}{double}"
    return "8-bit" if found.get("load_in_8bit") else str(found.get("quant_method"))
