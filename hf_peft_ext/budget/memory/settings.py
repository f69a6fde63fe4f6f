"""The arguments of a memory estimate, and their checks."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.training_args import OptimizerNames

from hf_peft_ext.budget.model_class import HEAD_CLASSES
from hf_peft_ext.validation.checks import check, check_count
from hf_peft_ext.validation.suggestions import did_you_mean

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
ATTENTION_CHOICES = ("sdpa", "eager", "flash", "efficient", "math")
# Sharding -> the parts that are divided by the number of devices.
MODEL_STATES = ("weights", "quantization_constants", "adapter_weights", "gradients", "optimizer_states")
SHARDINGS = {"zero1": MODEL_STATES[4:], "zero2": MODEL_STATES[3:], "zero3": MODEL_STATES, "fsdp": MODEL_STATES}
QUANTIZATIONS = ("nf4", "nf4-dq", "int8")
DEVICES = ("cuda", "cpu")
MEMORY_TASKS = [task for task in HEAD_CLASSES if task != "FEATURE_EXTRACTION"]  # the others have a loss


@dataclass(frozen=True)
class MemorySettings:
    """What a training step is like; see `estimate_memory` for the fields."""

    batch: int = 1
    length: int = 512
    dtype: str | torch.dtype | None = None
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    quantization: str | BitsAndBytesConfig | None = None
    devices: int = 1
    sharding: str | None = None
    autocast: str | torch.dtype | None = None
    task_type: str | None = None
    target_length: int | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("batch", "length", "devices"):
            check_count(name, getattr(self, name))
        if self.target_length is not None:
            check_count("target_length", self.target_length)
        for name, of_weights in (("dtype", True), ("autocast", False)):
            value = getattr(self, name)
            text = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            check_choice(name, text, (*WEIGHT_DTYPES[not of_weights :], None))
            object.__setattr__(self, name, text)
        check_choice("optimizer", self.optimizer, [name.value for name in OptimizerNames])
        check_choice(
            "attention", self.attention, ATTENTION_CHOICES if self.device == "cuda" else ATTENTION_CHOICES[:2]
        )
        check_choice("sharding", self.sharding, (*SHARDINGS, None))
        check_choice("task_type", self.task_type, (*MEMORY_TASKS, None))
        check_choice("device", self.device, DEVICES)
        if not isinstance(self.quantization, BitsAndBytesConfig):
            check_choice("quantization", self.quantization, (*QUANTIZATIONS, None))
        check("sharding", self.sharding, self.sharding is None or self.devices > 1, "must have `devices` above 1")
        if self.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError("`quantization` needs bitsandbytes: pip install 'hf_peft_ext[quantized]'.")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the products with quantized weights."""
        return getattr(torch, str(self.autocast or "bfloat16"))

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """The quantization as transformers has it."""
        if self.quantization is None or isinstance(self.quantization, BitsAndBytesConfig):
            return self.quantization
        if self.quantization == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.quantization == "nf4-dq",
            bnb_4bit_compute_dtype=self.compute_dtype,
        )


def check_choice(name: str, value: Any, choices: Iterable[str | None]) -> None:
    """Raise a ValueError unless the value is one of some names; the error has the nearest name."""
    choices = list(choices)
    if value not in choices:
        names = [choice for choice in choices if choice is not None]
        hint = did_you_mean(value, names) or "."
        raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(names)}{hint}")
