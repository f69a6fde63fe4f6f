"""Loads an adapter's file through peft, and restores the model if a tensor is missing or has another shape.

peft only warns of a missing tensor and keeps its random values. It refuses another shape after it has copied the other
tensors.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hf_peft_ext.registry import extend

# Whether other shapes are refused. None while no file is loaded: a direct call of `set_peft_model_state_dict` returns
# the missing keys instead.
_sizes_must_fit: ContextVar[bool | None] = ContextVar("_sizes_must_fit", default=None)
# The model that the current `from_pretrained` has built, if its adapter could not be loaded.
_failed: ContextVar[list[PeftModel] | None] = ContextVar("_failed", default=None)


def check_complete(tuner_cls: type[BaseTuner], model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Refuse a file with missing tensors or other shapes, before any tensor is copied.

    Args:
        tuner_cls: the class of the adapter's tuner, which defines its keys.
        state: the tensors of the file, by their names in the model.

    Raises:
        ValueError: a tensor is missing, or has another shape.
    """
    sizes_must_fit = _sizes_must_fit.get()
    if sizes_must_fit is None:
        return
    expected = model.state_dict()
    in_file = {key: tuner_cls._remove_adapter_name_from_key(key, adapter_name) for key in expected}
    missing = [name for key, name in in_file.items() if name != key and key not in state]
    if missing:
        raise ValueError(f"The adapter's file lacks tensors: {first_keys(missing)}.")
    for key, tensor in state.items():
        if sizes_must_fit and key in expected and tensor.shape != expected[key].shape:
            shape, rule = tuple(tensor.shape), f"but its config implies {tuple(expected[key].shape)}"
            raise ValueError(f"{in_file[key]} has shape {shape}, {rule}.")


def first_keys(keys: Iterable[str]) -> str:
    """The first three keys in alphabetical order, for an error."""
    keys = sorted(keys)
    return ", ".join(key[:200] for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@extend
def load_adapter(
    stock: Callable[..., Any], model: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """`PeftModel.load_adapter` with `check_complete`. An adapter that cannot be loaded is deleted.

    Raises:
        ValueError: the file lacks a tensor, or holds one of another shape (unless `ignore_mismatched_sizes` is set).
    """
    present = adapter_name in model.peft_config
    token = _sizes_must_fit.set(not kwargs.get("ignore_mismatched_sizes"))
    try:
        return stock(model_id, adapter_name, *args, **kwargs)
    except BaseException as error:
        failed, key = _failed.get(), error.args[0] if isinstance(error, KeyError) else None
        missing = isinstance(key, str) and is_saved_whole(model, key)
        if failed is not None:
            failed.append(model)
        elif not present and adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        if missing:
            raise ValueError(f"The adapter's file lacks tensors: {key}.") from error
        raise
    finally:
        _sizes_must_fit.reset(token)


def is_saved_whole(model: nn.Module, key: str) -> bool:
    """Whether a key belongs to a module that peft saves whole, or to trainable tokens."""
    wrapped = (path for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    return key.startswith(tuple(f"{path}." for path in wrapped))


@extend
def from_pretrained(
    stock: Callable[..., Any], cls: type[PeftModel], model: nn.Module, model_id: Any, *args: Any, **kwargs: Any
) -> Any:
    """`PeftModel.from_pretrained`. The base model is restored if an adapter of this package cannot be loaded."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    nested = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    failed: list[PeftModel] = []
    token = _failed.set(failed)
    try:
        return stock(model, model_id, *args, **kwargs)
    except BaseException:
        for built in failed:
            remove_adapter(built, nested)
        if failed:
            for parameter, requires_grad in trainable:
                parameter.requires_grad = requires_grad
        raise
    finally:
        _failed.reset(token)


def remove_adapter(built: PeftModel, nested: bool) -> None:
    """Restore a base model to its state before it received its adapter.

    Args:
        built: the model with the adapter.
        nested: whether the base model has adapters of other tuners, which stay.
    """
    tuner: Any = built.base_model
    if nested:
        tuner.delete_adapter(built.active_adapter)
        return
    for path, module in list(tuner.model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # peft's `unload` would leave the trainable copy
            parent, _, name = path.rpartition(".")
            setattr(tuner.model.get_submodule(parent), name, module.original_module)
    tuner.unload()
