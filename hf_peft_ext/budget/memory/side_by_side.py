"""Methods side by side: the memory of each at the same model, batch and length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig

from hf_peft_ext.budget.memory.bridge import build_bridge
from hf_peft_ext.budget.memory.build import build_model
from hf_peft_ext.budget.memory.estimate import PART_TITLES, MemoryEstimate, ModelBuilder, estimate
from hf_peft_ext.budget.memory.settings import MemorySettings
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
        build: builds the model that is trained.
    """

    title: str
    config: Callable[[], PeftConfig] | None = None
    quantization: str | None = None
    build: ModelBuilder = build_model


def all_linear() -> PeftConfig:
    """LoRA on all linear leaves, as in the QLoRA paper, with peft's default rank."""
    return LoraConfig(target_modules="all-linear")


def queries_and_values() -> PeftConfig:
    """LoRA on queries and values of any architecture."""
    return UniPELTConfig(methods=["lora"], gated=False)


MEMORY_METHODS = {
    "full": MemoryMethod("full fine-tuning"),
    "lora": MemoryMethod("LoRA", all_linear),
    "qlora": MemoryMethod("QLoRA", all_linear, "nf4-dq"),
    "unipelt": MemoryMethod("UniPELT", UniPELTConfig),
    "qunipelt": MemoryMethod("UniPELT, NF4", UniPELTConfig, "nf4-dq"),
    "ladder": MemoryMethod("ladder", LadderConfig),
    "qladder": MemoryMethod("ladder, NF4", LadderConfig, "nf4-dq"),
    "plug_in": MemoryMethod("plug-in, bridge", queries_and_values, build=build_bridge),
}
DEFAULT_METHODS = ("full", "lora", "qlora", "unipelt", "ladder", "plug_in")
FOR_SOME_MODELS = ("ladder", "plug_in")  # they need blocks of a kind


def compare_memory(
    model_or_config: Any, methods: Sequence[str] | None = None, **settings: Any
) -> dict[str, MemoryEstimate]:
    """Title of a method -> its estimate.

    "plug_in" is the stage of plug-in transfer that trains the adapter in the paper's bridge, without the large model
    in memory; see `build_bridge`. Not included are the stages before it, which hold the large model to cut it or train
    the small model, and the delta bridge, which runs the large model. `examples/benchmarks/plug_in_memory.py` measures
    all stages.

    Args:
        model_or_config: as in `estimate_memory`.
        methods: names of `MEMORY_METHODS`. None for full, lora, qlora, unipelt, ladder and plug_in; the last two are
            left out where the architecture does not take them.
        settings: arguments of `estimate_memory`. `quantization` is that of the quantized methods, and `autocast` is
            bfloat16 for them unless it is named.

    Raises:
        ValueError: a method is unknown or cannot be used with the model, or an argument is not valid.
    """
    rule = "must be a list of names"
    check("methods", methods, methods is None or (not isinstance(methods, str) and bool(methods)), rule)
    estimates: dict[str, MemoryEstimate] = {}
    for name in DEFAULT_METHODS if methods is None else methods:
        if name not in MEMORY_METHODS:
            hint = did_you_mean(name, MEMORY_METHODS) or "."
            raise ValueError(f"`methods` (={name!r}) must be one of {', '.join(MEMORY_METHODS)}{hint}")
        try:
            estimates[MEMORY_METHODS[name].title] = estimate_method(model_or_config, MEMORY_METHODS[name], settings)
        except ValueError:
            if methods is not None or name not in FOR_SOME_MODELS:
                raise
    return estimates


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
    return estimate(model_or_config, adapter, MemorySettings(**options), method.build)


def memory_rows(estimates: Mapping[str, MemoryEstimate]) -> list[dict[str, str]]:
    """A row for each estimate: its title, its parts and the peak; parts that no estimate has are left out."""
    parts = [name for name in next(iter(estimates.values())).parts if any(e.parts[name] for e in estimates.values())]
    rows = []
    for title, of_method in estimates.items():
        sizes = {PART_TITLES[name]: of_method.parts[name] for name in parts} | {"peak": of_method.peak}
        cells = {name: in_units(size, BYTES) if size else "" for name, size in sizes.items()}
        rows.append({"method": title, "trained": f"{of_method.trained:,}", **cells})
    return rows
