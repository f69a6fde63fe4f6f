"""The memory of a training step, from a config alone: the real model and adapter run on fake tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from peft import PeftConfig
from transformers import BitsAndBytesConfig

from hf_peft_ext.budget.memory.build import ModelSource, build_model, model_source
from hf_peft_ext.budget.memory.cards import card_bytes
from hf_peft_ext.budget.memory.fit import largest_fitting
from hf_peft_ext.budget.memory.settings import MODEL_STATES, SHARDINGS, MemorySettings
from hf_peft_ext.budget.memory.step import trace_step
from hf_peft_ext.hub_cards.markdown import BYTES, in_units
from hf_peft_ext.validation.checks import check

ModelBuilder = Callable[[ModelSource, MemorySettings], tuple[Any, set[int]]]  # as `build_model`

# Bytes that a process holds on a device beside torch's tensors: the CUDA context with the kernels of torch and cuBLAS.
# It depends on driver and card, about 0.4 to 0.7 GiB; torch's own counters leave it out.
FRAMEWORK = {"cuda": 2**29, "cpu": 0}
PART_TITLES = {
    "weights": "weights",
    "quantization_constants": "quantization constants",
    "adapter_weights": "adapter weights",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations",
    "logits_and_loss": "logits and loss",
    "temporaries": "temporaries",
    "framework": "framework",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a training step. The parts add up to `peak`.

    Args:
        weights: parameters and buffers of the base model, packed where it is quantized.
        quantization_constants: scales and code tables of packed weights.
        adapter_weights: parameters and buffers that the adapter adds, copies in `modules_to_save` included.
        gradients: of trained parameters, as far as they exist at the peak.
        optimizer_states: the optimizer's tensors.
        activations: what autograd has kept at the end of the forward pass and not freed at the peak.
        logits_and_loss: all that the head of a language model and its loss allocate, in both passes.
        temporaries: everything else: gradients of activations, recomputed activations, dequantized weights, the
            optimizer's intermediate results, weights that FSDP gathers.
        framework: a constant for the CUDA context; torch's counters leave it out.
        trained: number of trained parameters.
        settings: the settings.
        source: the model or config, the adapter, and the function that builds the trained model.
    """

    weights: int
    quantization_constants: int
    adapter_weights: int
    gradients: int
    optimizer_states: int
    activations: int
    logits_and_loss: int
    temporaries: int
    framework: int
    trained: int
    settings: MemorySettings
    source: Any = field(repr=False)

    @property
    def parts(self) -> dict[str, int]:
        """Part -> bytes, in the order of the table."""
        return {name: getattr(self, name) for name in PART_TITLES}

    @property
    def peak(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """The bytes that torch counts, on a GPU by `torch.cuda.max_memory_allocated`."""
        return self.peak - self.framework

    def table(self) -> str:
        """The parts, one a line, and their sum."""
        rows = [(PART_TITLES[name], size) for name, size in self.parts.items() if size] + [("peak", self.peak)]
        return "\n".join(f"{title:<24}{in_units(size, BYTES):>12}" for title, size in rows)

    def largest(self, what: Literal["batch", "length"], card: str | int) -> int:
        """The largest batch or length that fits a card, other settings alike; 0 if not even 1 fits.

        Each attempt is an estimate of its own. A length ends at the config's `max_position_embeddings`.

        Args:
            what: "batch" or "length".
            card: the card's name, a size such as "24GiB", or bytes.

        Raises:
            ValueError: there is no such card, or nothing of that name to vary.
        """
        check("what", what, what in ("batch", "length"), "must be batch or length")
        model, peft_config, build = self.source
        limit = getattr(model_source(model, peft_config, self.settings).config, "max_position_embeddings", None)

        def peak(value: int) -> int:
            if value == getattr(self.settings, what):
                return self.peak
            return estimate(model, peft_config, replace(self.settings, **{what: value}), build).peak

        start = getattr(self.settings, what)
        return largest_fitting(peak, card_bytes(card), start, limit if what == "length" else None)

    def to_dict(self) -> dict[str, Any]:
        """The parts, the peak and the settings, for JSON."""
        settings = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        if isinstance(self.settings.quantization, BitsAndBytesConfig):
            settings["quantization"] = self.settings.quantization.to_diff_dict()
        sizes = {**self.parts, "allocated": self.allocated, "peak": self.peak, "trained": self.trained}
        return {**sizes, "settings": settings}


def estimate_memory(
    model_or_config: Any,
    peft_config: PeftConfig | None = None,
    *,
    batch: int = 1,
    length: int = 512,
    dtype: str | torch.dtype | None = None,
    optimizer: str = "adamw_torch_fused",
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    quantization: str | BitsAndBytesConfig | None = None,
    devices: int = 1,
    sharding: str | None = None,
    autocast: str | torch.dtype | None = None,
    task_type: str | None = None,
    target_length: int | None = None,
    device: str = "cuda",
) -> MemoryEstimate:
    """Estimate the peak memory of a training step. No weights are loaded, and no GPU is needed.

    The model is built by transformers, the adapter attached by peft, and forward pass, loss, backward pass and
    optimizer run on torch's FakeTensor, which have shapes but no data. So everything that torch runs is counted as it
    runs, and no architecture is written down. A mixture of experts is estimated with transformers' default,
    "grouped_mm", whose tensors have the same sizes wherever tokens are routed.

    Args:
        model_or_config: a config, a transformers model on any device (its weights are not read), a PeftModel, a Hub
            id, or a folder.
        peft_config: the adapter; None for full fine-tuning.
        batch: rows of a batch, on each device.
        length: tokens of a row, without padding.
        dtype: of the weights: float32, bfloat16 or float16; None for the config's.
        optimizer: a name of `TrainingArguments.optim`.
        gradient_checkpointing: whether blocks are recomputed in the backward pass.
        attention: "sdpa" (the kernel that torch chooses), "eager" (keeps all scores), or a kernel of sdpa on a GPU:
            "flash", "efficient", "math".
        quantization: "nf4", "nf4-dq" (double quantization), "int8", or a BitsAndBytesConfig. The model is prepared by
            `prepare_model_for_kbit_training`. Needs the extra `quantized`. In 8 bits on a GPU the estimate was a
            quarter too low (two measured rows).
        devices: number of devices, for `sharding`.
        sharding: what is divided by `devices`: "zero1" the optimizer's states, "zero2" the gradients too, "zero3" or
            "fsdp" the weights too; the largest block is then gathered.
        autocast: bfloat16 or float16, as `TrainingArguments.bf16` and `fp16` do; None for no autocast.
        task_type: peft's name of the task, for a config; None for the adapter's, or one that suits the model.
        target_length: tokens of an answer, for encoder-decoder models; None for `length`.
        device: "cuda", or "cpu" for training on a CPU.

    Raises:
        ValueError: a value is not valid, the config cannot be built on the meta device, the adapter cannot be
            attached, or the forward pass depends on the values of tensors.
        TypeError: `model_or_config` is of another kind.
        ImportError: `quantization` needs bitsandbytes.
    """
    settings = MemorySettings(
        batch=batch,
        length=length,
        dtype=dtype,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        attention=attention,
        quantization=quantization,
        devices=devices,
        sharding=sharding,
        autocast=autocast,
        task_type=task_type,
        target_length=target_length,
        device=device,
    )
    return estimate(model_or_config, peft_config, settings)


def estimate(
    model_or_config: Any, peft_config: PeftConfig | None, settings: MemorySettings, build: ModelBuilder = build_model
) -> MemoryEstimate:
    """`estimate_memory` with checked settings, of the model that `build` makes."""
    source = model_source(model_or_config, peft_config, settings)
    full_rule = "must be None for full fine-tuning: packed weights cannot be trained"
    is_valid = settings.quantization is None or source.peft_config is not None
    check("quantization", settings.quantization, is_valid, full_rule)
    model, base = build(source, settings)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    check("peft_config", type(source.peft_config).__name__, trained > 0, "must train a parameter")
    gathered = gathered_bytes(model, settings)
    sizes = trace_step(model, base, settings)
    sizes["temporaries"] += sizes.pop("forward", 0)
    for part in SHARDINGS.get(settings.sharding or "", ()):
        sizes[part] = -(-sizes[part] // settings.devices)
    sizes["temporaries"] += gathered
    parts = {name: sizes[name] for name in PART_TITLES if name != "framework"}
    return MemoryEstimate(
        **parts,
        framework=FRAMEWORK[settings.device],
        trained=trained,
        settings=settings,
        source=(model_or_config, peft_config, build),
    )


def gathered_bytes(model: Any, settings: MemorySettings) -> int:
    """Bytes of the largest block, which a device gathers whole when weights are sharded."""
    if MODEL_STATES[0] not in SHARDINGS.get(settings.sharding or "", ()):
        return 0
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    return max((sum(p.nbytes for p in block.parameters()) for block in blocks), default=0)
