"""The four strategies of S4 as placements, and the parameters of each in each layer of a model."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_peft_ext.attach.config import PREFIX_FORMS, ComposedConfig, Initialization
from hf_peft_ext.attach.make_sublayer import SharedParts, build
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.attach.resolve import layer_count, resolve
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import find_sites, override_sites
from hf_peft_ext.model.structure import innermost, leaf_size, stacks
from hf_peft_ext.validation.checks import check

Stack = Literal["joint", "separate"]
STRATEGIES = ("adapter", "prefix", "bitfit", "lora")
SUBLAYERS = {"bottleneck": "adapter", "prefix": "prefix", "bias": "bitfit", "low_rank": "lora"}
SIZES = {"adapter": "r", "prefix": "num_virtual_tokens", "lora": "r"}  # the option that holds the size


def placed(strategy: str, size: int, layers: Sequence[int], init: Initialization = "base") -> list[Placement]:
    """A strategy in some layers.

    Args:
        strategy: "adapter" (Pfeiffer's, after the FFN and its residual), "prefix" (in attention), "bitfit" (biases) or
            "lora" (on queries and values, scaled by 2 whatever its rank).
        size: width of the bottleneck, number of prefix vectors, or rank; ignored for BitFit.
        layers: indices of the layers.
        init: how the sub-layers begin, see `attach.config.InitConfig`.
    """
    if strategy == "adapter":
        adapter = {"r": size} | ({"init": 0.02} if init == "paper" else {})
        return [Placement("bottleneck", "after_residual", list(layers), options=adapter)]
    if strategy == "prefix":
        prefix = {"num_virtual_tokens": size, "form": PREFIX_FORMS[init]}
        return [Placement("prefix", "attention", list(layers), options=prefix)]
    if strategy == "bitfit":
        return [Placement("bias", "bias", list(layers))]
    options = {"r": size, "alpha": 2 * size}
    return [Placement("low_rank", site, list(layers), options=dict(options)) for site in ("query", "value")]


def sizes_in(placements: Sequence[Placement]) -> dict[int, dict[str, int]]:
    """Layer -> strategy -> size, of placements from `placed`; the size of BitFit is 1."""
    sizes: dict[int, dict[str, int]] = defaultdict(dict)
    for placement in placements:
        strategy = SUBLAYERS[placement.sublayer]
        for layer in placement.layers or []:
            sizes[layer][strategy] = placement.options.get(SIZES.get(strategy, ""), 1)
    return dict(sizes)


def all_placed(sizes: Mapping[int, Mapping[str, int]], init: Initialization = "base") -> list[Placement]:
    """The inverse of `sizes_in`: layers with the same strategy and size share a placement."""
    layers: dict[tuple[str, int], list[int]] = defaultdict(list)
    for layer in sorted(sizes):
        for strategy, size in sizes[layer].items():
            layers[strategy, size].append(layer)
    return [p for (strategy, size), where in layers.items() for p in placed(strategy, size, where, init)]


class Cost(NamedTuple):
    """Parameters of a strategy in a layer: fixed + unit * size. Biases are fixed, and their unit is 0."""

    fixed: int
    unit: int


@dataclass(frozen=True)
class Costs:
    """The parameters of strategies in a model.

    Args:
        parameters: number of parameters of the base model; a budget is a share of it.
        stacks: the layers of each stack of blocks, encoder before decoder.
        of: strategy -> layer -> its cost there; layers without a site for it are left out.
    """

    parameters: int
    stacks: list[list[int]]
    of: dict[str, dict[int, Cost]]

    def grouped_stacks(self, stack: Stack) -> list[list[int]]:
        """The stacks whose layers are grouped: all layers as one stack, or each stack separately."""
        return self.stacks if stack == "separate" else [[layer for layers in self.stacks for layer in layers]]

    def parameters_at(self, layer: int, sizes: Mapping[str, int]) -> int:
        """Parameters of a layer whose strategies have these sizes."""
        costs = {s: self.of[s][layer] for s in sizes if layer in self.of[s]}
        return sum(cost.fixed + cost.unit * sizes[s] for s, cost in costs.items())


def costs_of(model: nn.Module, strategies: Sequence[str], **fields: Any) -> Costs:
    """The cost of strategies in each layer of a model: they are resolved on it, and built without data.

    Args:
        model: the base model, which is not changed.
        strategies: names of strategies.
        fields: other fields of the config, such as `sites`, `exclude_modules` or `layers_to_transform`.

    Raises:
        ValueError: a strategy has no site in this model, or a field is wrong.
    """
    layers = stack_layers(model, fields.get("sites"), fields.get("layers_to_transform"))
    everywhere = [layer for stack in layers for layer in stack]
    probe = ComposedConfig(placements=[p for s in strategies for p in placed(s, 1, everywhere)], **fields)
    costs: dict[str, dict[int, Cost]] = {strategy: {} for strategy in strategies}
    alike: dict[tuple[Any, ...], Cost] = {}  # sites of the same shape, as most are
    for pairs in resolve(model, probe)[0].values():
        for placement, site in pairs:
            strategy, layer = SUBLAYERS[placement.sublayer], site.layer
            shape = (strategy, site.d_in, site.d_out, site.heads, site.d_k, site.d_v)
            if shape not in alike:
                alike[shape] = cost_at(strategy, site)
            if layer is not None:
                so_far = costs[strategy].get(layer, Cost(0, 0))
                costs[strategy][layer] = Cost(*map(sum, zip(so_far, alike[shape], strict=True)))
    return Costs(base_parameters(model), layers, costs)


def cost_at(strategy: str, site: Site) -> Cost:
    """The cost of a strategy at one site, from two sizes of it on the meta device."""
    with torch.device("meta"):
        sublayers = [build(placed(strategy, size, [])[0], site, SharedParts()) for size in (1, 2)]
    one, two = (sum(parameter.numel() for parameter in sublayer.parameters()) for sublayer in sublayers)
    return Cost(2 * one - two, two - one)


def stack_layers(model: nn.Module, sites: Any = None, chosen: list[int] | int | None = None) -> list[list[int]]:
    """The chosen layers of each stack of a model; a stack without any is left out.

    Args:
        model: the base model.
        sites: the field of the config.
        chosen: indices of layers; None for all.

    Raises:
        ValueError: a chosen layer does not exist.
    """
    counts = [len(stack) for _, stack in stacks(model)]
    if not counts:
        counts = [layer_count(model, override_sites(model, find_sites(model), sites or {}))]
    only = [chosen] if isinstance(chosen, int) else chosen
    for layer in only or []:
        rule = f"names layer {layer}, which does not exist; this model has layers 0 to {sum(counts) - 1}"
        check("layers_to_transform", chosen, layer < sum(counts), rule)
    layers, start = [], 0
    for count in counts:
        layers.append([layer for layer in range(start, start + count) if only is None or layer in only])
        start += count
    return [stack for stack in layers if stack]


def base_parameters(model: nn.Module) -> int:
    """Parameters of the base model, without adapters. Shared ones count once, packed ones with their full shape."""
    seen: set[int] = set()
    total = 0
    for path, module in own_modules(model):
        if "modules_to_save" in path.split(".") or isinstance(module, AuxiliaryTrainingWrapper):
            continue
        module = innermost(module)
        size, own = leaf_size(module), dict(module.named_parameters(recurse=False))
        if size and "weight" not in own:  # a quantized leaf whose weight is no parameter
            total += prod(size)
        for name, parameter in own.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += prod(size) if size and name == "weight" else parameter.numel()
    return total
