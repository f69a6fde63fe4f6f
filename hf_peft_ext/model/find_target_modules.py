"""Finds what peft's configs take as `target_modules` and `target_parameters`, by the structure of a model."""

from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _find_minimal_target_modules
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import expert_tensors, layer_paths
from hf_peft_ext.validation.checks import check

ATTENTION = ("query", "key", "value", "attention_output")
FEEDFORWARD = ("ffn_input", "ffn_gate", "ffn_output")
MIXER = "mixer_input"  # in a layer whose mixer has no query and value


def find_target_modules(
    model: nn.Module, sites: Sequence[str] = ("query", "value"), feedforward: bool = False
) -> list[str]:
    """The `target_modules` of LoRA, DoRA, (IA)³, LoHa, OFT and other methods of peft that change linear layers.

    peft's own defaults are a table of model types. Here the projections of attention are found in the structure of the
    model, in encoder and decoder, self- and cross-attention. A fused projection of queries, keys and values is one
    module. In layers with another mixer in place of attention (Mamba) it is the mixer's input projection.

        config = LoraConfig(target_modules=find_target_modules(model))

    Args:
        model: a transformers model without adapters; it may be on the meta device.
        sites: projections of attention: "query", "key", "value", "attention_output".
        feedforward: whether to add the linear layers of feed-forward networks.

    Returns:
        The shortest endings of module paths that match these modules and no others, sorted.

    Raises:
        ValueError: a site is unknown, the model has adapters, or it has no such linear layer.
    """
    check("sites", sites, not isinstance(sites, str), "must be a list of sites, not a single string")
    for name in sites:
        check("sites", name, name in ATTENTION, f"must be one of {', '.join(ATTENTION)}")
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    check("model", type(model).__name__, not adapted, "must be a model without adapters")
    wanted = [*sites, *(FEEDFORWARD if feedforward else ()), *([MIXER] if {"query", "value"} & {*sites} else [])]
    modules: dict[str, Any] = dict(model.named_modules())
    targets = {
        site.host
        for site in find_sites(model)
        if any(site.serves(name) for name in wanted) and isinstance(modules[site.host], nn.Linear | Conv1D)
    }
    rule = f"must have linear layers at {', '.join(wanted)}; none were found"
    check("model", type(model).__name__, bool(targets), rule)
    return sorted(_find_minimal_target_modules(sorted(targets), sorted({*modules} - targets - {""})))


def find_target_parameters(model: nn.Module) -> list[str]:
    """The `target_parameters` of peft's LoRA: the experts of mixtures that are one tensor, such as Mixtral's.

    They are no linear layers, so that `target_modules` cannot name them. LoRA gives each expert a low-rank branch of
    its own at its input and output projection (`gate_up_proj`, `down_proj`).

        config = LoraConfig(
            target_modules=find_target_modules(model), target_parameters=find_target_parameters(model), r=2
        )

    Args:
        model: a transformers model without adapters; it may be on the meta device.

    Returns:
        The shortest endings of parameter paths that match these parameters and no others, sorted.

    Raises:
        ValueError: the model has adapters, or no such parameter.
    """
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    check("model", type(model).__name__, not adapted, "must be a model without adapters")
    targets = [
        f"{path}.{name}"
        for layer in layer_paths(model)
        for path, module in own_modules(model.get_submodule(layer), layer)
        for name in expert_tensors(module)
    ]
    check("model", type(model).__name__, bool(targets), "must have experts that are one tensor; none were found")
    others = {name for name, _ in model.named_parameters()} - {*targets}
    return sorted(_find_minimal_target_modules(targets, sorted(others)))
