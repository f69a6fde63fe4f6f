"""Linear combinations of the weights of adapters of one model."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from hf_peft_ext.sublayers import ProjectedPrefix
from hf_peft_ext.validation.checks import check, is_number

OF_PEFT = {f.name for f in fields(PeftConfig)}  # fields that change no output
COMBINED = ("modules_to_save", "trainable_tokens_delta")  # peft's containers of weights, by adapter name


def add_weighted_adapter(tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """See `AdapterTuner.add_weighted_adapter`."""
    configs = tuner.peft_config
    check("adapters", adapters, not isinstance(adapters, str) and len(adapters) > 0, "must be a list of names")
    check("adapters", adapters, {*adapters} <= configs.keys(), f"must be adapters of this model: {sorted(configs)}")
    check("weights", weights, len(weights) == len(adapters), "must have one number for each adapter")
    check("weights", weights, all(map(is_number, weights)), "must be numbers")
    check("adapter_name", adapter_name, adapter_name not in configs, "is taken by an adapter of this model")
    first = configs[adapters[0]]
    for name in adapters[1:]:
        kind, own = type(configs[name]).__name__, type(first).__name__
        check("adapters", adapters, kind == own, f"must be of one type, not of {own} and {kind}")
        different = [field for field, value in effects(first).items() if getattr(configs[name], field) != value]
        check("adapters", adapters, not different, f"must have equal configs, but differ in {', '.join(different)}")
    for _, entries in containers(tuner):
        check_equal_indices([entries[name] for name in adapters if name in entries])
    config = deepcopy(first)
    configs[adapter_name] = config.stored() if hasattr(config, "stored") else config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        del configs[adapter_name]
        raise
    for container, entries in containers(tuner):
        if adapter_name in entries:
            states = [tensors(entries[name]) for name in adapters]
            for key, target in tensors(container[adapter_name]).items():
                combine(target, [state[key] for state in states], weights)


def effects(config: PeftConfig) -> dict[str, Any]:
    """The fields of a config that peft does not have in all its configs."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OF_PEFT}


def containers(tuner: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each container of adapters' modules or weights in a model, and its entries by adapter name."""
    for path, module in tuner.model.named_modules():
        if path.rpartition(".")[2] in (tuner.container, *COMBINED):
            yield module, dict(module.items())


def tensors(entry: Any) -> dict[str, Tensor]:
    """The tensors of an adapter in a container; of a reparameterised prefix, its vectors."""
    if isinstance(entry, ProjectedPrefix):
        entry = entry.to_plain()
    return entry.state_dict() if isinstance(entry, nn.Module) else {"": entry.data}


def check_equal_indices(entries: list[Any]) -> None:
    """Refuse adapters whose weights belong to different entries of a parameter.

    Raises:
        ValueError: a tensor of integers differs.
    """
    for key, index in tensors(entries[0]).items() if entries else ():
        if not index.is_floating_point():
            same = all(torch.equal(index, tensors(entry)[key]) for entry in entries[1:])
            check("adapters", key, same, "must be equal in all adapters: their weights are of different entries")


@torch.no_grad()
def combine(target: Tensor, sources: list[Tensor], weights: Sequence[float]) -> None:
    """target = sum_i w_i source_i; tensors of integers, which are equal, are copied."""
    if not target.is_floating_point():
        target.copy_(sources[0])
        return
    total = sum(weight * source.to(target) for weight, source in zip(weights, sources, strict=True))
    target.copy_(total)  # pyright: ignore[reportArgumentType]
