"""Methods side by side: the memory of each at the same model, batch and length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig

from hf_peft_ext.budget.memory.estimate import PART_TITLES, MemoryEstimate, estimate_memory
from hf_peft_ext.hub_cards.markdown import BYTES, in_units
from hf_peft_ext.tuners import LadderConfig, UniPELTConfig
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.suggestions import did_you_mean


@dataclass(frozen=True)
class MemoryMethod:
    """A way to train a model.

    Args:
        title: its name in tables.
        config: makes its adapter; None for full fine-tuning.
        quantization: of the base model.
    """

    title: str
    config: Callable[[], PeftConfig] | None = None
    quantization: str | None = None


def all_linear() -> PeftConfig:
    """LoRA on all linear leaves, as in the QLoRA paper, with peft's default rank."""
    return LoraConfig(target_modules="all-linear")


MEMORY_METHODS = {
    "full": MemoryMethod("full fine-tuning"),
    "lora": MemoryMethod("LoRA", all_linear),
    "qlora": MemoryMethod("QLoRA", all_linear, "nf4-dq"),
    "unipelt": MemoryMethod("UniPELT", UniPELTConfig),
    "qunipelt": MemoryMethod("UniPELT, NF4", UniPELTConfig, "nf4-dq"),
    "ladder": MemoryMethod("ladder", LadderConfig),
    "qladder": MemoryMethod("ladder, NF4", LadderConfig, "nf4-dq"),
}


def compare_memory(
    model_or_config: Any, methods: Sequence[str] = ("full", "lora", "qlora", "unipelt", "ladder"), **settings: Any
) -> dict[str, MemoryEstimate]:
    """Title of a method -> its estimate.

    Args:
        model_or_config: as in `estimate_memory`.
        methods: names of `MEMORY_METHODS`.
        settings: arguments of `estimate_memory`. `quantization` is that of the quantized methods, and `autocast` is
            bfloat16 for them unless it is named.

    Raises:
        ValueError: a method is unknown, or an argument is not valid.
    """
    check("methods", methods, not isinstance(methods, str) and bool(methods), "must be a list of names")
    for name in methods:
        if name not in MEMORY_METHODS:
            hint = did_you_mean(name, MEMORY_METHODS) or "."
            raise ValueError(f"`methods` (={name!r}) must be one of {', '.join(MEMORY_METHODS)}{hint}")
    return {
        MEMORY_METHODS[name].title: estimate_method(model_or_config, MEMORY_METHODS[name], settings)
        for name in methods
    }


def estimate_method(model_or_config: Any, method: MemoryMethod, settings: Mapping[str, Any]) -> MemoryEstimate:
    """The estimate of a method; see `compare_memory`."""
    options = dict(settings)
    if method.quantization is None:
        options.pop("quantization", None)
    else:
        options["quantization"] = options.get("quantization") or method.quantization
        if options.get("autocast") is None:
            options["autocast"] = "bfloat16"
    adapter = None if method.config is None else method.config()
    return estimate_memory(model_or_config, adapter, **options)


def memory_rows(estimates: Mapping[str, MemoryEstimate]) -> list[dict[str, str]]:
    """A row for each estimate: its title, its parts and the peak; parts that no estimate has are left out."""
    parts = [name for name in next(iter(estimates.values())).parts if any(e.parts[name] for e in estimates.values())]
    rows = []
    for title, estimate in estimates.items():
        sizes = {PART_TITLES[name]: estimate.parts[name] for name in parts} | {"peak": estimate.peak}
        cells = {name: in_units(size, BYTES) if size else "" for name, size in sizes.items()}
        rows.append({"method": title, "trained": f"{estimate.trained:,}", **cells})
    return rows
