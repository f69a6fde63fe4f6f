"""W_plug by least squares between what the small and the large model make of the same tokens."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_peft_ext.attach.layer import hidden_states
from hf_peft_ext.model.modes import preserve_requires_grad
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import stacks
from hf_peft_ext.transfer.map.adapter_tensors import READS, RESIDUAL, WRITES, space
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
    """Fill the projections in place: W x_small nearest to x_large where they write, and W^T x_large nearest to x_small
    where they read.

    The residual stream is what the blocks read, all layers together; other spaces are what a layer's own leaves read
    or write. Adapters are off. A good fit of states makes no good module: see the class `Projections`.

    Args:
        projections: W_plug, as `plug` made it.
        small, large: both models with adapters.
        layers: the small model's layer for each of the large one's.
        batches: inputs of both, without padding.

    Raises:
        ValueError: there are no batches.
    """
    of_small, of_large = defaultdict(list), defaultdict(list)
    for batch in batches:
        for model, found in ((small, of_small), (large, of_large)):
            note_states(model, batch, found)
    check("batches", len(of_large), bool(of_large), "must hold at least one, to begin W_plug by least squares")
    pairs: defaultdict[Space, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (name, layer), states in of_large.items():
        assert layer is not None
        where: Space = (name, None if name == RESIDUAL else layer)
        pairs[where] += zip(of_small[name, layers[layer]], states, strict=True)
    for where, found in pairs.items():
        x_small, x_large = (torch.cat(states) for states in zip(*found, strict=True))
        for side in ("read", "write"):
            fill(projections, where, side, x_small, x_large)


@torch.no_grad()
def fill(projections: Projections, where: Space, side: Side, x_small: Tensor, x_large: Tensor) -> None:
    name = key_of(where, side)
    dense = projections.of[name] if name in projections.of else None
    if isinstance(dense, Dense):
        reads = side == "read"
        dense.weight.copy_(least_squares(x_large, x_small).T if reads else least_squares(x_small, x_large))


def note_states(model: PeftModel, batch: Mapping[str, Any], found: States) -> None:
    """Run a model without its adapter and note the states of every space of every layer."""
    base: Any = model.get_base_model()
    handles = []
    for layer, block in enumerate(block for _, blocks in stacks(base) for block in blocks):

        def stream(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            found[RESIDUAL, layer].append(hidden_states(args, kwargs).flatten(0, -2))

        handles.append(block.register_forward_pre_hook(stream, with_kwargs=True))
    for site in find_sites(base):
        name = site.name.removeprefix("cross_")
        if site.act != "input" or site.layer is None or name not in {*READS, *WRITES}:
            continue

        def leaf(_: nn.Module, args: Any, output: Tensor, site: Any = site, name: str = name) -> None:
            if name in READS:
                found[space(site, "read"), site.layer].append(args[0].flatten(0, -2))
            if name in WRITES:
                rows = output if site.rows is None else output[..., site.rows.to(output.device)]
                found[space(site, "write"), site.layer].append(rows.flatten(0, -2))

        handles.append(base.get_submodule(site.host).register_forward_hook(leaf))
    try:
        with torch.no_grad(), preserve_requires_grad(model), model.disable_adapter():
            base(**batch)
    finally:
        for handle in handles:
            handle.remove()
