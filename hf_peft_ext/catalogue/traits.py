"""The traits of methods, as `measure.py` has measured them with the tested version of peft."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Traits:
    """What a method does with its default settings.

    Args:
        starts_at_base: whether the untrained adapter leaves the outputs as they are.
        merges: whether it merges into the weights of the base model, with equal outputs.
        to_lora: whether peft converts it to LoRA.
        mixes: whether the rows of a batch can have different adapters (`adapter_names`).
        backprop: whether gradients pass through the base model.
        saves_storage: whether the file has less than half of the model's numbers.
        saves_memory: whether less than half of the model's number of parameters is trained.
        inference: what inference has in addition: "FFN", "input", "layers"; "none" for what merges.
    """

    starts_at_base: bool
    merges: bool
    to_lora: bool
    mixes: bool
    backprop: bool
    saves_storage: bool
    saves_memory: bool
    inference: str


@cache
def measurements() -> dict[str, Any]:
    """The content of measured.json: the version of peft, and the traits by the names of methods."""
    return json.loads(MEASURED.read_text("utf-8"))


def traits_of(name: str) -> Traits:
    """The traits of a method.

    Raises:
        ValueError: the method could not be measured.
    """
    values = measurements()["traits"].get(name, {"error": f"`name` (={name!r}) must be measured first."})
    if "error" in values:
        raise ValueError(values["error"])
    return Traits(**values)
