"""Builds an adapter on the model itself, first without data, so that refusing its file costs no memory.

The tensors get memory after the file was checked. This saves a copy of the model and a second adapter on it. It is
possible for adapters without other tensors than those in the file.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.layer import TunerLayer
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.loading.expected_tensors import MetaAdapter, attach_on_meta, tensors_of
from hf_peft_ext.loading.weights import check_weights

HEAD_NAMES = ("classifier", "score", "qa_outputs", "qa_output")  # modules that peft saves whole for a task type
# peft's initialisations that need shapes only, and fields that read the weights of the base model.
PLAIN_STARTS = (True, False, "gaussian")
COMPUTED = ("use_dora", "trainable_token_indices", "loftq_config", "lora_ga_config", "eva_config", "corda_config")


class NeedsCopyError(Exception):
    """The adapter must be built on a copy of the model first."""


def load_in_place(
    model: nn.Module, config: PeftConfig, adapter_name: str, folder: Path, is_trainable: bool
) -> PeftModel:
    """Attach an adapter without data, check its weights, and load them. The model is restored on any failure.

    Raises:
        ValueError: the config does not fit the model, or the weights do not fit the config.
        NeedsCopyError: the adapter has tensors that its file does not hold, or its name is ambiguous.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    by_path = dict(model.named_modules())
    modules = list(by_path.values())
    before = tensors_of(modules)
    if not can_load_in_place(model, by_path, before, config, adapter_name, weights.stat().st_size):
        raise NeedsCopyError
    with restored(model, modules, before), detached(model, modules, adapter_name):
        adapter = attach_on_meta(model, copy.deepcopy(config), adapter_name, before, low_cpu_mem_usage=False)
        if len(adapter.tensors) != len(adapter.expected) or any(adapter_name in key for key in adapter.expected):
            raise NeedsCopyError
        check_weights(weights, adapter.expected)
        allocate(adapter, adapter_name, before)
        if is_trainable and adapter.model is model:
            adapter.model.set_requires_grad(adapter_name)
        adapter.model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
    return adapter.model


def can_load_in_place(
    model: nn.Module,
    by_path: Mapping[str, nn.Module],
    before: list[Tensor],
    config: Any,
    adapter_name: str,
    file_size: int,
) -> bool:
    """Whether an adapter can be built on the model itself.

    Its tensors must depend on shapes only, and the modules that it copies with their data must fit into its file.

    Args:
        by_path: the modules of the model.
        before: parameters and buffers of the model.
        file_size: size of the weights file in bytes.
    """
    plain = type(config) in (LoraConfig, IA3Config) and getattr(config, "init_lora_weights", True) in PLAIN_STARTS
    if not (plain or isinstance(config, PlacedConfig)) or any(getattr(config, name, None) for name in COMPUTED):
        return False
    if getattr(model, "hf_device_map", None) or any(tensor.is_meta for tensor in before):
        return False
    if any(adapter_name in path for path in by_path):
        return False
    heads = (*HEAD_NAMES, *(config.modules_to_save or []))
    copied = [module for path, module in by_path.items() if path.endswith(heads)]
    return 2 * sum(tensor.numel() for module in copied for tensor in tensors_of(module.modules())) <= file_size


def allocate(adapter: MetaAdapter, adapter_name: str, before: list[Tensor]) -> None:
    """Give the adapter's tensors memory on the device, and in the type, that peft and the tuner would choose.

    Args:
        before: parameters and buffers of the model without the adapter.
    """
    devices = {tensor.device for tensor in before}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    for module in adapter.modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    if devices or any(tensor.dtype == torch.float64 for tensor in before):  # else float32 on `device` is right
        for module in adapter.modules:
            if isinstance(module, BaseTunerLayer):
                module._move_adapter_to_device_of_base_layer(adapter_name)
        tuner: Any = adapter.model.base_model
        tuner._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=True)


@contextmanager
def detached(model: nn.Module, modules: Sequence[nn.Module], adapter_name: str) -> Iterator[None]:
    """If the body fails, take the adapter off the tuner layers of this package, and remove the new layers.

    Args:
        modules: the modules of the model before the body.
    """
    layers = {id(module) for module in modules if isinstance(module, TunerLayer)}
    try:
        yield
    except BaseException:
        for layer in tuner_layers(model):
            if adapter_name in layer.sublayer_of:
                layer.sublayer_of.pop(adapter_name)
            if id(layer) not in layers:
                layer.remove()
        raise


@contextmanager
def restored(model: nn.Module, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> Iterator[None]:
    """If the body fails, give modules their attributes and hooks back, tensors `requires_grad`, the config its fields.

    Args:
        modules: all modules of the model.
        tensors: its parameters and buffers.
    """
    states = [(module, vars(module).copy(), container_contents(vars(module))) for module in modules]
    trainable = [tensor.requires_grad for tensor in tensors]
    config = getattr(model, "config", None)
    fields = vars(config).copy() if hasattr(config, "__dict__") else {}
    try:
        yield
    except BaseException:
        for module, attributes, containers in states:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in containers.items():
                refill(attributes[name], content)
        for tensor, requires_grad in zip(tensors, trainable, strict=True):
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad = requires_grad
        if fields:
            vars(config).clear()
            vars(config).update(fields)
        raise


def container_contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copies of the dictionaries, lists and sets of a module, which change in place; () for the empty ones."""
    containers = {name: value for name, value in attributes.items() if isinstance(value, (dict, list, set))}
    return {name: value.copy() if value else () for name, value in containers.items()}


def refill(container: Any, content: Any) -> None:
    """Replace the content of a dictionary, list or set in place, because hooks refer to the object."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
