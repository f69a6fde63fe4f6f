"""Read the gates of a model, or fix them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..placement import check
from ..sublayers import Gate
from .attach import child_name
from .composed import attached


def gates(model: nn.Module) -> dict[str, Gate]:
    """Name -> gate of the active adapters. A name is layer.site_sublayer, such as "3.query_low_rank"."""
    found: dict[str, Gate] = {}
    for layer in attached(model):
        for adapter in layer.present:
            sublayer = layer.sublayer_of[adapter]
            if isinstance(sublayer.gate, Gate):
                kind = {"Bottleneck": "bottleneck", "LowRank": "low_rank"}.get(type(sublayer).__name__, "prefix")
                name = f"{layer.site.layer}.{child_name(layer.site.name, kind)}"
                if len(layer.present) > 1:
                    name = f"{adapter}.{name}"
                found[name if name not in found else f"{name}.{layer.site.host.rpartition('.')[2]}"] = sublayer.gate
    return found


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
        ValueError: no active adapter of the model has a gate.
    """
    found = gates(model)
    check("model", type(model).__name__, bool(found), "has no active adapter with gates")
    values: dict[str, Tensor] = {}

    def keep(name: str, gate: Gate) -> RemovableHandle:
        ones = -1 if gate.pooling == "token" else (-2, -1)
        return gate.register_forward_hook(lambda _, args, g: values.update({name: g.float().squeeze(ones)}))

    handles = [keep(name, gate) for name, gate in found.items()]
    training = model.training
    try:
        model.eval()
        model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: values[name] for name in found if name in values}


def fix_gates(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
    """Fix every gate to its mean over a batch, in place, so that gated low-rank branches can be merged.

    A fixed gate has w = 0 and b = logit(mean): it is saved and loaded like any other.

    Returns:
        Layer and sub-layer -> the constant, as `gate_values` names them.
    """
    means = {name: value.mean().item() for name, value in gate_values(model, batch).items()}
    found = gates(model)
    for name, mean in means.items():
        found[name].fix(mean)
    return means
