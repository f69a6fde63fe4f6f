"""Builds the real model with the real adapter on the meta device, and moves it to fake tensors."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_peft_ext.budget.experts import expert_options
from hf_peft_ext.budget.memory.gpu_kernels import GpuKernels
from hf_peft_ext.budget.memory.quantize import packed
from hf_peft_ext.budget.memory.settings import MemorySettings
from hf_peft_ext.budget.model_class import head_task, model_class


@dataclass(frozen=True)
class ModelSource:
    """A model's config and class; the weights are of no interest.

    Args:
        config: the config.
        model_class: a class of transformers.
        peft_config: the adapter; None for full fine-tuning.
    """

    config: PreTrainedConfig
    model_class: Any
    peft_config: PeftConfig | None


def model_source(model_or_config: Any, peft_config: PeftConfig | None, settings: MemorySettings) -> ModelSource:
    """The config and the class of a model.

    Raises:
        TypeError: `model_or_config` is none of a config, a transformers model, a Hub id, a folder.
        ValueError: there is no config of that name, or it has no class for the task.
    """
    if isinstance(model_or_config, PeftModel):
        peft_config = peft_config or model_or_config.active_peft_config
        model_or_config = model_or_config.get_base_model()
    if isinstance(model_or_config, PreTrainedModel):
        return ModelSource(copy.deepcopy(model_or_config.config), type(model_or_config), peft_config)
    if isinstance(model_or_config, (str, Path)):
        config = config_named(model_or_config)
    elif isinstance(model_or_config, PreTrainedConfig):
        config = copy.deepcopy(model_or_config)
    else:
        kind = type(model_or_config).__name__
        raise TypeError(f"`model_or_config` (={kind}) must be a config, a transformers model, a Hub id or a folder.")
    task = settings.task_type or head_task(config, peft_config)
    return ModelSource(config, model_class(config, task, "model_or_config"), peft_config)


def config_named(name: str | Path) -> PreTrainedConfig:
    """The config of a Hub id, of a folder, or of a JSON file."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`model_or_config` (={str(name)!r}) must have a config that can be read: {reason}"
        ) from error


def build_model(source: ModelSource, settings: MemorySettings) -> tuple[Any, set[int]]:
    """The model in training mode on the meta device, quantized and with its adapter, as for real training.

    Args:
        source: config, class and adapter.
        settings: the settings.

    Returns:
        The model, and the ids of the base model's tensors.

    Raises:
        ValueError: the config cannot be built on the meta device, or the adapter cannot be attached.
    """
    quantization = settings.quantization_config()
    with without_warnings(), torch.device("meta"):
        model = cast(Any, meta_base_model(source, settings))
        if quantization is not None:
            model = packed(model, quantization)
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        if source.peft_config is not None:
            adapter = copy.deepcopy(source.peft_config)
            adapter.inference_mode = False
            model = get_peft_model(model, adapter)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(checkpoint_options(settings))
            if source.peft_config is not None:
                model.enable_input_require_grads()
    return model.train(), base


def checkpoint_options(settings: MemorySettings) -> dict[str, Any]:
    """Arguments of torch's `checkpoint`. A backward pass leaves modes, so recomputing must enter the GPU's again."""
    if settings.device == "cpu":
        return {"use_reentrant": False}
    return {"use_reentrant": False, "context_fn": lambda: (nullcontext(), GpuKernels(settings.attention))}


def meta_base_model(source: ModelSource, settings: MemorySettings) -> PreTrainedModel:
    """The base model on the meta device.

    Raises:
        ValueError: it cannot be built there.
    """
    config = source.config
    config.use_cache = False
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    dtype = settings.dtype or getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    attention = "eager" if settings.attention == "eager" else None  # None: sdpa, where the model has it
    try:
        return source.model_class._from_config(
            config, dtype=dtype, attn_implementation=attention, **expert_options(config)
        )
    except Exception as error:
        name = type(config).__name__
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`model_or_config` (={name}) must be a config that meta tensors can hold: {reason}"
        ) from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore the warnings of building and training, which are for real runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class FakeCopies:
    """Replaces the meta tensors of a model by fake ones; call it within a FakeTensorMode.

    Tensors that are shared, such as tied embeddings, stay shared.
    """

    def __init__(self) -> None:
        self.copies: dict[int, Tensor] = {}
        self.originals: list[Tensor] = []  # keeps their ids unique
        self.constants: list[Tensor] = []  # of quantization

    def replace_in(self, model: nn.Module) -> None:
        """Replace parameters, buffers and the constants of quantized weights."""
        module: Any
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = self.copy_of(tensor)
            if getattr(module, "quant_state", None) is not None:
                module.quant_state = module.weight.quant_state

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The fake copy of a tensor."""
        if id(tensor) not in self.copies:
            self.originals.append(tensor)
            fake: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            fake.__dict__.update(vars(tensor))
            self.copies[id(tensor)] = fake
            self.copy_constants(fake)
        return self.copies[id(tensor)]

    def copy_constants(self, weight: Any) -> None:
        """Replace what bitsandbytes keeps beside a packed weight."""
        if getattr(weight, "SCB", None) is not None:
            weight.CB, weight.SCB = weight, self.constant(weight.SCB)
        state = getattr(weight, "quant_state", None)
        while state is not None:
            for name, value in vars(state).items():
                if isinstance(value, Tensor):
                    setattr(state, name, self.constant(value))
            state = state.state2

    def constant(self, tensor: Tensor) -> Tensor:
        """The fake copy of a constant."""
        self.constants.append(self.copy_of(tensor))
        return self.constants[-1]
