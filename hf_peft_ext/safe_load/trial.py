"""Builds an adapter once, on the model itself: without data at first, so that a file that is refused costs nothing.

Where an adapter needs no more than its file holds, the tensors get memory after the file was checked. The copy of the
model that `implied_tensors` makes, and a second adapter built on it, are spared then.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..tuners.composed import attached
from ..tuners.config import PlacedConfig
from .implied import attach_without_data, tensors
from .weights import check_weights

HEADS = ("classifier", "score", "qa_outputs", "qa_output")  # modules that peft saves whole for a task type
# Fields of peft's own configs with which building reads or computes more than shapes.
PLAIN_STARTS = (True, False, "gaussian")
COMPUTED = ("use_dora", "trainable_token_indices", "loftq_config", "lora_ga_config", "eva_config", "corda_config")


class NotOnTrial(Exception):
    """The adapter has to be built on a copy first."""


def may_be_tried(model: nn.Module, config: Any, adapter_name: str, weights: Path) -> bool:
    """Whether an adapter can be built on the model itself without data.

    Its tensors must depend on shapes alone, and modules that are copied with their data must fit into the file.
    """
    plain = type(config) in (LoraConfig, IA3Config) and getattr(config, "init_lora_weights", True) in PLAIN_STARTS
    if not (plain or isinstance(config, PlacedConfig)) or any(getattr(config, name, None) for name in COMPUTED):
        return False
    if getattr(model, "hf_device_map", None) or any(tensor.is_meta for tensor in tensors(model)):
        return False
    copied, heads = 0, (*HEADS, *(config.modules_to_save or []))
    for path, module in model.named_modules():
        if adapter_name in path:
            return False
        copied += sum(tensor.numel() for tensor in tensors(module)) if path.endswith(heads) else 0
    return 2 * copied <= weights.stat().st_size


def load_on_trial(
    model: nn.Module, config: PeftConfig, adapter_name: str, weights: Path, is_trainable: bool
) -> PeftModel:
    """Build an adapter, check its file, and load it; whatever fails, the model is as it was.

    Raises:
        ValueError: the config does not fit the model, or the file does not fit the config.
        NotOnTrial: the adapter has tensors that its file does not hold, or its name is in their keys.
    """
    with restored(model), taken_off(model, adapter_name, attached(model)):
        base = tensors(model)
        given = {id(tensor) for tensor in base}
        adapted, implied = attach_without_data(model, copy.deepcopy(config), adapter_name, False)
        if sum(id(tensor) not in given for tensor in tensors(adapted)) != len(implied):
            raise NotOnTrial
        if any(adapter_name in key for key in implied):
            raise NotOnTrial
        check_weights(weights, implied)
        give_memory(adapted, adapter_name, base)
        if is_trainable and adapted is model:
            adapted.set_requires_grad(adapter_name)
        adapted.load_adapter(str(weights.parent), adapter_name, is_trainable=is_trainable)
    return adapted


def give_memory(adapted: PeftModel, adapter_name: str, base: list[Tensor]) -> None:
    """Memory for the tensors on the meta device, where peft and the tuner would have put them.

    Args:
        base: the tensors of the model without the adapter.
    """
    devices = {tensor.device for tensor in base}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    for module in adapted.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    if devices or any(tensor.dtype == torch.float64 for tensor in base):  # else they lie right, in float32
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):
                module._move_adapter_to_device_of_base_layer(adapter_name)
        tuner: Any = adapted.base_model
        tuner._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=True)


@contextmanager
def taken_off(model: nn.Module, adapter_name: str, before: list[Any]) -> Iterator[None]:
    """If the body fails, tuner layers of ours let go of what is no module."""
    try:
        yield
    except BaseException:
        for layer in attached(model):
            if adapter_name in layer.sublayer_of:
                layer.sublayer_of.pop(adapter_name)
            if layer not in before:
                layer.remove()
        raise


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """If the body fails, every module of the model gets back the attributes it had, down to its hooks."""
    modules = [(module, vars(module).copy(), copies(vars(module))) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = getattr(model, "config", None)
    settings = vars(config).copy() if hasattr(config, "__dict__") else {}
    try:
        yield
    except BaseException:
        for module, attributes, contents in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                put_back(attributes[name], content)
        for parameter, requires_grad in parameters:
            parameter.requires_grad = requires_grad
        if settings:
            vars(config).clear()
            vars(config).update(settings)
        raise


def copies(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copies of the containers among the attributes of a module, which are changed in place."""
    return {name: value.copy() for name, value in attributes.items() if isinstance(value, (dict, list, set))}


def put_back(container: Any, content: Any) -> None:
    """Give a dictionary, list or set its former content; it stays the same object, which hooks refer to."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
