"""Read or fix the gates of a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.model.modes import evaluating
from hf_peft_ext.sublayers import Gate
from hf_peft_ext.validation.checks import check


def gates(model: nn.Module) -> dict[str, Gate]:
    """Name -> gate of the active adapters. A name is layer.site_sublayer, such as "3.query_low_rank"."""
    gate_by_name: dict[str, Gate] = {}
    for layer in tuner_layers(model):
        for adapter in layer.active_here:
            place = layer.site.host if layer.site.name == "target" else layer.site.layer
            name = f"{place}.{layer.name}" if len(layer.active_here) == 1 else f"{adapter}.{place}.{layer.name}"
            if isinstance(gate := layer.sublayer_of[adapter].gate, Gate):
                gate_by_name[name] = gate
    return gate_by_name


@torch.no_grad()
def gate_values(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """How far each gate is open for each example of a batch.

    Args:
        model: a model with gated sub-layers, a `PeftModel` or not.
        batch: the arguments of its forward.

    Returns:
        Layer and sub-layer, such as "3.query_low_rank", -> gates between 0 and 1, shape (batch,) for gates that are
        means over tokens, (batch, length) for gates of single tokens.

    Raises:
        ValueError: no active adapter of the model has a gate, or the batch mixes adapters.
    """
    active_gates = gates(model)
    check("batch", sorted(batch), "adapter_names" not in batch, "must not mix adapters; activate one adapter instead")
    check("model", type(model).__name__, bool(active_gates), "has no active adapter with gates")
    values: dict[str, Tensor] = {}

    def keep(name: str, gate: Gate) -> RemovableHandle:
        shape = (-1,) if gate.pooling == "token" else ()
        return gate.register_forward_hook(lambda _, args, g: values.update({name: g.float().view(len(g), *shape)}))

    handles = [keep(name, gate) for name, gate in active_gates.items()]
    try:
        with evaluating(model):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: values[name] for name in active_gates if name in values}


def gate_means(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
    """The mean of every gate over a batch, padding left out.

    Args:
        model: a model with gated sub-layers, a `PeftModel` or not.
        batch: the arguments of its forward.

    Returns:
        Layer and sub-layer -> mean, as `gate_values` names them.

    Raises:
        ValueError: as in `gate_values`.
    """
    masks = [mask for key in ("attention_mask", "decoder_attention_mask") if (mask := batch.get(key)) is not None]

    def mean(value: Tensor) -> float:
        weight = next((mask for mask in masks if mask.shape == value.shape), torch.ones_like(value))
        return ((value * weight).sum() / weight.sum()).item()

    return {name: mean(value) for name, value in gate_values(model, batch).items()}


def fix_gates(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
    """Fix every gate to its mean over a batch, padding left out, so that gated low-rank branches can be merged.

    A fixed gate has w = 0 and b = logit(mean): it is saved and loaded like any other.

    Returns:
        Layer and sub-layer -> the constant, as `gate_values` names them.
    """
    means = gate_means(model, batch)
    active_gates = gates(model)
    for name, constant in means.items():
        active_gates[name].fix(constant)
    return means
