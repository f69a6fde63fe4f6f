"""Converts ReFT: edits of the first and the last hidden states behind each block."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.converted import ConvertedSublayer, activation_of, linear
from hf_peft_ext.loading.adapterhub.names import layer_numbers
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.structure import layer_paths
from hf_peft_ext.sublayers.intervention import edit_names
from hf_peft_ext.validation.checks import check


def interventions(
    method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]
) -> Iterator[ConvertedSublayer]:
    """The interventions of a method.

    Raises:
        ValueError: a setting is not supported, or a tensor is missing or has another shape.
    """
    suffix, two_stacks = method["suffix_positions"], bool(model.config.is_encoder_decoder)
    rule = "must be 0 in an encoder-decoder, whose decoder takes the lengths of the encoder's rows in the library"
    check("suffix_positions", suffix, not two_stacks or suffix == 0, rule)
    chosen, numbers = method["layers"], layer_numbers(model)
    orthogonality, tied = method["orthogonality"], method["tied_weights"]
    if not orthogonality and "subtract_projection" not in method:
        warnings.warn(
            "The library saves NoReFT and DiReFT alike, and loads both as NoReFT; so does this import. If the adapter "
            'is DiReFT, add "subtract_projection": false to `config` in its adapter_config.json.',
            stacklevel=2,
        )
    options = {
        **{"r": method["r"], "prefix_positions": method["prefix_positions"], "suffix_positions": suffix},
        **{"tied_weights": tied, "orthogonality": orthogonality, "dropout": method["dropout"]},
        "subtract_projection": method.get("subtract_projection", True),
        "activation": activation(method),
    }
    for site in sites:
        if site.name != "block_output" or not (chosen == "all" or numbers[site.layer or 0] in chosen):
            continue
        path = f"{layer_paths(model)[site.layer or 0]}.reft_layer.refts.units"
        tensors: dict[str, Tensor] = {}
        for unit, name in enumerate(["all"] if tied else ["first", "last"]):  # also of tokens that are not edited
            w, b = linear(checkpoint, f"{path}.{unit}.learned_source")
            rows = projection(checkpoint, f"{path}.{unit}.projection", orthogonality)
            tensors |= {f"edit_of.{name}.{key}": tensor for key, tensor in (("R", rows), ("W", w), ("b", b))}
        used = edit_names(method["prefix_positions"], suffix, tied)
        tensors = {key: tensor for key, tensor in tensors.items() if key.split(".")[1] in used}
        yield ConvertedSublayer("intervention", site, None, options, tensors)


def activation(method: Settings) -> str:
    """The activation function, by its name in transformers."""
    return "linear" if method["non_linearity"] is None else activation_of(method)


def projection(checkpoint: Checkpoint, name: str, orthogonality: bool) -> Tensor:  # shape: (r, d)
    """Take R; where it is orthogonal, torch's parametrization computes it from what it saves."""
    if not orthogonality:
        return checkpoint.take(f"{name}.weight")
    base, original = (
        checkpoint.take(f"{name}.parametrizations.weight.{part}").float() for part in ("0.base", "original")
    )
    r, d = original.shape
    layer: Any = orthogonal(nn.Linear(d, r, bias=False))
    with torch.no_grad():
        layer.parametrizations.weight[0].base.copy_(base)
        layer.parametrizations.weight.original.copy_(original)
        return layer.weight.clone()
