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
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext, _device_constructors

from ..placement import check

FILLING = (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_)
SPARE = 2**22  # numbers beyond those in the file that building an adapter may allocate: 16 MiB in float32


def implied_tensors(model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, Tensor]:
    """The tensors that the adapter's file must hold, on the meta device, by their keys there.

    The model and the config stay as they are, and nothing is allocated, whatever the config says.

    Raises:
        ValueError: the config does not fit the model, or the adapter would allocate more than its file holds.
    """
    _, found = attach_without_data(without_data(model), copy.deepcopy(config), adapter_name)
    return found


def attach_without_data(
    model: nn.Module, config: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool = True
) -> tuple[PeftModel, dict[str, Tensor]]:
    """Give a model an adapter whose tensors are on the meta device.

    Args:
        low_cpu_mem_usage: as in peft, whose way to the meta device copies each tensor once more.

    Returns:
        The model with the adapter, and the tensors that the adapter's file must hold, by their keys there.

    Raises:
        ValueError: as `implied_tensors`. The model is half changed then.
    """
    given = {id(tensor): tensor for tensor in tensors(model)}
    known = "\n".join(path for path, _ in model.named_modules())
    try:
        with WithoutValues(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user sees them when the adapter is loaded
            adapted = with_adapter(model, config, adapter_name, low_cpu_mem_usage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new = sum(tensor.numel() for tensor in tensors(adapted) if id(tensor) not in given)
            found = get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
        with torch.device("meta"):
            if adapter_name in known or any(adapter_name in key for key in found):
                check_name(adapted, found, adapter_name)
            check_rows(adapted, adapter_name)
    except Exception as error:  # peft raises all kinds; each of them says that the config cannot be carried out
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"The adapter does not fit {type(model).__name__}: {reason}") from error
    held = sum(tensor.numel() for tensor in found.values())
    if new > 2 * held + SPARE:
        raise ValueError(f"The adapter would allocate {new} numbers, but its file must hold {held} only.")
    return adapted, found


def check_name(model: PeftModel, state: dict[str, Tensor], adapter_name: str) -> None:
    """Refuse a name by which peft would take the adapter's tensors for others: it looks for the name in their keys."""
    if not model.peft_config[adapter_name].is_prompt_learning:
        lost = set_peft_model_state_dict(model, state, adapter_name).unexpected_keys
        check("adapter_name", adapter_name, not lost, "is the name of a part of the model; take another")


def check_rows(model: nn.Module, adapter_name: str) -> None:
    """Refuse trained tokens that the vocabulary does not have."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            rows, size = module.token_indices.get(adapter_name, []), len(module.weight)
            check("token_indices", rows, all(0 <= row < size for row in rows), f"must be rows of 0 to {size - 1}")


def with_adapter(model: nn.Module, config: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool) -> PeftModel:
    """The model with an adapter, as peft makes it when it loads one."""
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        return model
    peft_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
    return peft_cls(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)


class WithoutValues(DeviceContext):
    """As `torch.device("meta")`; and nothing is filled with values, which takes most of building an adapter there."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))
        self.making = _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.making:
            if kwargs.get("device") is None:
                kwargs["device"] = self.device
        elif func in FILLING or getattr(func, "__module__", None) == "torch.nn.init":
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)


class OnMeta(TorchFunctionMode):
    """While it is active, a deep copy of a tensor has its shape and type, but no data, unless it is a single number.

    Single numbers stay, since they are read (bitsandbytes' offsets).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        copied = tensor.clone() if tensor.numel() == 1 else torch.empty_like(tensor, device="meta")
        return memo.setdefault(id(tensor), copied)


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a model with its tensors on the meta device."""
    parameters = list(model.parameters())
    memo: dict[int, Any] = {}  # filled beforehand, since parameters copy themselves in ways of their own
    for parameter in parameters:
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = torch.Tensor._make_subclass(type(parameter), meta, parameter.requires_grad)
    with OnMeta():
        for parameter in parameters:  # what it carries: the statistics of a quantised weight, its module
            vars(memo[id(parameter)]).update(copy.deepcopy(vars(parameter), memo))
        return copy.deepcopy(model, memo)


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
