"""Batches that mix adapters: what `adapter_names` must be, and how modules that are trained whole get to know it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..placement import check
from .attach import hidden_states


def check_names(names: Sequence[str], adapters: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse `adapter_names` that are not one known adapter for each row of the batch in `args` and `kwargs`."""
    inputs = (*args, *(kwargs.get(key) for key in ("input_ids", "inputs", "inputs_embeds")))
    rows = next((len(tensor) for tensor in inputs if isinstance(tensor, Tensor)), len(names))
    rule = f"must have one name for each of the {rows} rows"
    check("adapter_names", names, bool(names) and len(names) == rows, rule)
    unknown = set(names) - {"__base__", *adapters}
    if unknown:
        raise ValueError(f"`adapter_names` holds {sorted(unknown)}, but the adapters are {sorted(adapters)}.")


def check_unmerged(layers: Iterable[Any]) -> None:
    if any(layer.merged for layer in layers):
        raise ValueError("`adapter_names` cannot be used while adapters are merged; unmerge them first.")


def each_row(names: Sequence[str], rows: int) -> list[str]:
    """The adapter of each of the rows that a module reads.

    Beam search and modules that flatten tokens make several rows of one; they lie side by side.
    """
    return [name for name in names for _ in range(rows // len(names))]


@contextmanager
def known_to_copies(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within, the modules of `modules_to_save` use for each row the copy of its adapter."""

    def pass_names(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "adapter_names": each_row(names, len(hidden_states(args, kwargs)))}

    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [wrapper.register_forward_pre_hook(pass_names, with_kwargs=True) for wrapper in wrappers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
