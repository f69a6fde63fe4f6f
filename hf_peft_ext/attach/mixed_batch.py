"""Batches that mix adapters: checks of `adapter_names`, and how they reach the modules of a model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hf_peft_ext.attach.forward_state import FORWARD, hidden_states
from hf_peft_ext.validation.checks import check

# Arguments that hold the rows of a batch.
INPUTS = (
    "input_ids",
    "inputs",
    "inputs_embeds",
    "pixel_values",
    "input_features",
    "input_values",
)


def check_adapter_names(names: Sequence[str], adapters: Iterable[str]) -> None:
    """Refuse `adapter_names` that are no list, or that hold a name without an adapter."""
    check("adapter_names", names, not isinstance(names, str), "must be a list of names, one for each row")
    unknown = set(names) - {"__base__", *adapters}
    if unknown:
        raise ValueError(f"`adapter_names` holds {sorted(unknown)}, but the adapters are {sorted(adapters)}.")


def check_unmerged(layers: Iterable[Any]) -> None:
    """Refuse mixed batches while adapters are merged."""
    if any(layer.merged for layer in layers):
        raise ValueError("`adapter_names` cannot be used while adapters are merged; unmerge them first.")


def check_rows(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Refuse `adapter_names` unless there is one for each row of a batch.

    Returns:
        Whether the batch is among the arguments.

    Raises:
        ValueError: there are more or fewer names than rows.
    """
    inputs = (*args, *(kwargs.get(key) for key in INPUTS))
    batch = next((tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.ndim > 0), None)
    if batch is not None:
        rule = f"must have one name for each of the {len(batch)} rows"
        check("adapter_names", list(names), len(names) == len(batch), rule)
    return batch is not None


def each_row(names: Sequence[str], rows: int) -> list[str]:
    """The adapter of each of the rows that a module reads.

    Beam search and modules that flatten tokens repeat each row; its copies are adjacent.
    """
    return [name for name in names for _ in range(rows // len(names))]


@contextmanager
def mixed_batch(
    model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Within, each row of a batch goes through its own adapter.

    The number of names is checked at once if the batch is among the arguments, else when the base model is called
    (`PeftModelFor...` passes only names). Modules in `modules_to_save` use each row's own copy.

    Args:
        model: the base model.
        names: the adapter of each row.
        args, kwargs: the arguments of the base model, as far as they are available.

    Raises:
        ValueError: there are more or fewer names than rows.
    """
    mine = list(names)  # other threads may have their own batches and hooks on the same modules

    def check_call(module: nn.Module, args: Any, kwargs: Any) -> None:
        if FORWARD.row_adapters is mine:
            check_rows(mine, args, kwargs)

    def pass_names(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if FORWARD.row_adapters is not mine:
            return args, kwargs
        return args, {**kwargs, "adapter_names": each_row(mine, len(hidden_states(args, kwargs)))}

    # after this check, generation may repeat rows (beams)
    checked = check_rows(mine, args, kwargs)
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [wrapper.register_forward_pre_hook(pass_names, with_kwargs=True) for wrapper in wrappers]
    if not checked:
        handles.append(model.register_forward_pre_hook(check_call, with_kwargs=True))
    before, FORWARD.row_adapters = FORWARD.row_adapters, mine
    try:
        yield
    finally:
        FORWARD.row_adapters = before
        for handle in handles:
            handle.remove()
