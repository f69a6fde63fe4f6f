"""W_plug by least squares between states of the small and the large model on the same tokens."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_peft_ext.attach.forward_state import hidden_states
from hf_peft_ext.model.modes import preserve_requires_grad
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import stacks
from hf_peft_ext.pruning.channels import RESIDUAL
from hf_peft_ext.transfer.map.adapter_tensors import INPUT_SPACES, OUTPUT_SPACES, space_of
from hf_peft_ext.transfer.map.projections import Dense, Projections, Side, Space, key_of, least_squares
from hf_peft_ext.validation.checks import check

States = dict[Space, list[Tensor]]  # space of a layer -> shape of each: (tokens, d)


def align(
    projections: Projections,
    small: PeftModel,
    large: PeftModel,
    layers: list[int],
    batches: Iterable[Mapping[str, Any]],
) -> None:
    """Fit the projections in place: W x_small to x_large for outputs, W^T x_large to x_small for inputs.

    States of the residual stream are the inputs of the blocks, all layers together. States of other spaces are the
    inputs or outputs of a layer's own leaves. Adapters are disabled. A good fit does not make a good adapter, see
    `Projections`.

    Args:
        projections: W_plug.
        small, large: both models with adapters.
        layers: the small model's layer for each of the large one's.
        batches: inputs of both, without padding.

    Raises:
        ValueError: there are no batches.
    """
    of_small, of_large = defaultdict(list), defaultdict(list)
    for batch in batches:
        for model, states in ((small, of_small), (large, of_large)):
            record_states(model, batch, states)
    check("batches", len(of_large), bool(of_large), "must hold at least one batch, to fit W_plug by least squares")
    pairs: defaultdict[Space, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (name, layer), states in of_large.items():
        assert layer is not None
        space: Space = (name, None if name == RESIDUAL else layer)
        pairs[space] += zip(of_small[name, layers[layer]], states, strict=True)
    for space, of_space in pairs.items():
        x_small, x_large = (torch.cat(states) for states in zip(*of_space, strict=True))
        for side in ("in", "out"):
            fill_projection(projections, space, side, x_small, x_large)


@torch.no_grad()
def fill_projection(
    projections: Projections,
    space: Space,
    side: Side,
    x_small: Tensor,  # shape: (tokens, d_small)
    x_large: Tensor,  # shape: (tokens, d_large)
) -> None:
    """Fill one projection, if it exists and is dense."""
    name = key_of(space, side)
    dense = projections.of[name] if name in projections.of else None
    if isinstance(dense, Dense):
        weight = least_squares(x_large, x_small).T if side == "in" else least_squares(x_small, x_large)
        dense.weight.copy_(weight)


def record_states(model: PeftModel, batch: Mapping[str, Any], states: States) -> None:
    """Run a model without its adapters, and append the states of every space of every layer to `states`."""
    base: Any = model.get_base_model()
    handles = []
    for layer, block in enumerate(block for _, blocks in stacks(base) for block in blocks):

        def stream(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            states[RESIDUAL, layer].append(hidden_states(args, kwargs).flatten(0, -2))

        handles.append(block.register_forward_pre_hook(stream, with_kwargs=True))
    for site in find_sites(base):
        name = site.name.removeprefix("cross_")
        if site.act != "input" or site.layer is None or name not in {*INPUT_SPACES, *OUTPUT_SPACES}:
            continue

        def leaf(_: nn.Module, args: Any, output: Tensor, site: Any = site, name: str = name) -> None:
            if name in INPUT_SPACES:
                states[space_of(site, "in"), site.layer].append(args[0].flatten(0, -2))
            if name in OUTPUT_SPACES:
                rows = output if site.rows is None else output[..., site.rows.to(output.device)]
                states[space_of(site, "out"), site.layer].append(rows.flatten(0, -2))

        handles.append(base.get_submodule(site.host).register_forward_hook(leaf))
    try:
        with torch.no_grad(), preserve_requires_grad(model), model.disable_adapter():
            base(**batch)
    finally:
        for handle in handles:
            handle.remove()
