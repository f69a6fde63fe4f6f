"""What a config implies on a model: the adapter is built on a copy of the model without data."""

import copy
import warnings
from typing import Any

import torch
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from ..placement import check

SPARE = 2**22  # numbers beyond those in the file that building an adapter may allocate: 16 MiB in float32


def implied_tensors(model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, Tensor]:
    """The tensors that the adapter's file must hold, on the meta device, by their keys there.

    The model and the config stay as they are, and nothing is allocated, whatever the config says.

    Raises:
        ValueError: the config does not fit the model, or the adapter would allocate more than its file holds.
    """
    config = copy.deepcopy(config)
    skeleton = without_data(model)
    given = {id(tensor) for tensor in tensors(skeleton)}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user sees them when the adapter is loaded
            adapted = with_adapter(skeleton, config, adapter_name)
            found = get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
            check_name(adapted, found, adapter_name)
    except Exception as error:  # peft raises all kinds; each of them says that the config cannot be carried out
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"The adapter does not fit {type(model).__name__}: {reason}") from error
    new = sum(tensor.numel() for tensor in tensors(adapted) if id(tensor) not in given)
    held = sum(tensor.numel() for tensor in found.values())
    if new > 2 * held + SPARE:
        raise ValueError(f"The adapter would allocate {new} numbers, but its file must hold {held} only.")
    return found


def check_name(model: PeftModel, state: dict[str, Tensor], adapter_name: str) -> None:
    """Refuse a name by which peft would take the adapter's tensors for others: it looks for the name in their keys."""
    if not model.peft_config[adapter_name].is_prompt_learning:
        lost = set_peft_model_state_dict(model, state, adapter_name).unexpected_keys
        check("adapter_name", adapter_name, not lost, "is the name of a part of the model; take another")


def with_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    """The model with an adapter, as peft makes it when it loads one."""
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
        return model
    peft_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
    return peft_cls(model, config, adapter_name, low_cpu_mem_usage=True)


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors are all on the meta device."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = on_meta(value)
                memo |= {id(part): part for part in vars(value).values()}  # a quantised weight's statistics
    return copy.deepcopy(model, memo)


def on_meta(tensor: Tensor) -> Tensor:
    """The tensor without its data: of the same kind, with the same attributes."""
    meta = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        meta = torch.Tensor._make_subclass(type(tensor), meta, tensor.requires_grad)
    vars(meta).update(vars(tensor))
    return meta


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
