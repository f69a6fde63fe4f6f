"""The bridge of plug-in transfer on the meta device, to estimate its training stage."""

import copy
from typing import Any

import torch
from peft import get_peft_model

from hf_peft_ext.budget.memory.build import ModelSource, checkpoint_options, meta_base_model, without_warnings
from hf_peft_ext.budget.memory.settings import MemorySettings
from hf_peft_ext.pruning.channels import find_channels
from hf_peft_ext.pruning.prune import PrunedModel, drop_extra_modules
from hf_peft_ext.pruning.pruned_config import pruned_config
from hf_peft_ext.transfer import Projections, bridge, plug

BRIDGE_R = 16.0  # the paper's: a sixteenth of the parameters


def build_bridge(source: ModelSource, settings: MemorySettings) -> tuple[Any, set[int]]:
    """The paper's bridge with the plugged adapter, in training mode on the meta device.

    The pruned copy has 1 / 16 of the large model's parameters and is trained with the adapter. The large model is not
    held, and W_plug and W_down are slices. The small model, whose widths the adapter has, has the sizes of the pruned
    copy.

    Args:
        source: config and class of the large model, and the adapter.
        settings: the settings.

    Returns:
        The bridge, and the ids of the pruned copy's tensors.

    Raises:
        ValueError: the model cannot be cut, or the adapter cannot be plugged in.
    """
    with without_warnings(), torch.device("meta"):
        large = meta_base_model(source, settings)
        small, pruned = pruned_shapes(large), pruned_shapes(large)
        config: Any = copy.deepcopy(source.peft_config)
        adapted: Any = get_peft_model(small.model, config)
        plugged = plug(adapted, large, Projections("slice", trainable=False))
        base = {id(tensor) for tensor in (*pruned.model.parameters(), *pruned.model.buffers())}
        model: Any = bridge(plugged, pruned)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(checkpoint_options(settings))
    return model.train(), base


def pruned_shapes(large: Any) -> PrunedModel:
    """A pruned copy of a model on the meta device; it has the first units of each axis."""
    model = type(large)(pruned_config(large, BRIDGE_R, "parameters"))
    drop_extra_modules(model, large)
    sizes = find_channels(model).sizes
    kept = {axis: torch.arange(units, device="cpu") for axis, units in sizes.items()}
    return PrunedModel(model.to(large.dtype), kept, find_channels(large))
