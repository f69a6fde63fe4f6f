"""Loads an adapter's file through peft, and restores the model if a tensor is missing or has another shape.

peft only warns of a missing tensor and keeps its random values. It refuses another shape after it has copied the other
tensors.

`PeftModel.load_adapter` is extended on the first use of this package, which may be the config that
`PeftModel.from_pretrained` reads. By then `from_pretrained` is running and cannot be extended. So the tuner records
the base model's state when it is built, and `load_adapter` restores it.
"""

import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from traceback import walk_stack
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hf_peft_ext.registry import extend_on_first_use

# Whether other shapes are refused. None while no file is loaded: a direct call of `set_peft_model_state_dict` returns
# the missing keys instead.
_sizes_must_fit: ContextVar[bool | None] = ContextVar("_sizes_must_fit", default=None)


class BaseState(NamedTuple):
    """A base model before a tuner changed it.

    Args:
        requires_grad: the flag of each parameter, by weak references: a trainer may replace parameters.
        nested: whether the model has adapters of other tuners.
    """

    requires_grad: list[tuple[ref[nn.Parameter], bool]]
    nested: bool


# tuner -> its base model's state before; not an attribute of the tuner, since weak references cannot be pickled
_before: WeakKeyDictionary[BaseTuner, BaseState] = WeakKeyDictionary()


def record_base_model(tuner: BaseTuner, model: nn.Module) -> None:
    """Record the state of a base model, before the tuner injects its first adapter."""
    requires_grad = [(ref(parameter), parameter.requires_grad) for parameter in model.parameters()]
    nested = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    _before[tuner] = BaseState(requires_grad, nested)


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


@extend_on_first_use
def load_adapter(
    stock: Callable[..., Any], model: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """`PeftModel.load_adapter` with `check_complete`. An adapter that cannot be loaded is deleted.

    If `PeftModel.from_pretrained` is the caller, the base model is restored to its state before.

    Raises:
        ValueError: the file lacks a tensor, or holds one of another shape (unless `ignore_mismatched_sizes` is set).
    """
    present = adapter_name in model.peft_config
    token = _sizes_must_fit.set(not kwargs.get("ignore_mismatched_sizes"))
    try:
        return stock(model_id, adapter_name, *args, **kwargs)
    except BaseException as error:
        key = error.args[0] if isinstance(error, KeyError) else None
        missing = isinstance(key, str) and is_saved_whole(model, key)
        if in_from_pretrained():
            restore_base_model(model)
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


def in_from_pretrained() -> bool:
    """Whether peft's `PeftModel.from_pretrained` is running, so that nobody else holds the model that it has built.

    Otherwise the user holds the model, and it keeps its adapters. The call stack is the only place to see this: peft
    passes nothing on that tells the two apart.
    """
    return any(
        frame.f_code.co_name == "from_pretrained" and frame.f_globals.get("__name__") == PeftModel.__module__
        for frame, _ in walk_stack(inspect.currentframe())
    )


def restore_base_model(built: PeftModel) -> None:
    """Restore a base model to its state before `from_pretrained` built a model with an adapter on it.

    Adapters of other tuners stay.
    """
    tuner: Any = built.base_model
    before = _before[tuner]
    if before.nested:
        tuner.delete_adapter(built.active_adapter)
    else:
        for path, module in list(tuner.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):  # peft's `unload` would leave the trainable copy
                parent, _, name = path.rpartition(".")
                setattr(tuner.model.get_submodule(parent), name, module.original_module)
        tuner.unload()
    for reference, requires_grad in before.requires_grad:
        parameter = reference()
        if parameter is not None:
            parameter.requires_grad = requires_grad
