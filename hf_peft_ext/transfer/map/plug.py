"""Puts the adapters of a small model on a large one; W_plug computes each tensor from the small model's."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.structure import innermost, stacks
from hf_peft_ext.pruning.channels import RESIDUAL
from hf_peft_ext.transfer.bridges.activations import check_has_weights
from hf_peft_ext.transfer.map.adapter_tensors import HEAD, AdapterTensor, AdapterTensors, Axis, leaf_sites
from hf_peft_ext.transfer.map.alignment import align
from hf_peft_ext.transfer.map.parametrize import Block, Step, parametrize
from hf_peft_ext.transfer.map.projections import Order, Projections, Space, layer_map
from hf_peft_ext.validation.checks import check


def plug(
    small: PeftModel,
    large: nn.Module,
    projections: Projections | None = None,
    order: Order = "interleaved",
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> PeftModel:
    """Put the active adapters of a small model on a large one, with tensors that W_plug computes.

    Each layer of the large model has a copy of the tensors of its layer in the small one, in the small one's widths.
    W_plug computes from them the tensors that the adapters work with. The copies are trained, and the projections if
    they are trainable; `merge_projections` leaves plain tensors. A classification head that was trained with an
    adapter is carried over.

    Args:
        small: a model with LoRAs, or with adapters of this package (bottlenecks, prefixes, low-rank branches and their
            gates). All active adapters are carried over, under their names, and are active afterwards. It is not
            changed.
        large: a model, whose own parameters are frozen. It may be one without weights, built in
            `with torch.device("meta")`, to be trained in a `bridge` and loaded onto the real one when it is merged.
        projections: W_plug; None for random orthogonal ones that are trained.
        order: which layer corresponds to which where depths differ, see `projections.layer_map`.
        batches: inputs of both models without padding, for projections that are fitted by least squares.

    Returns:
        The large model with the adapters.

    Raises:
        TypeError: an adapter is of a kind that cannot be plugged in, or `large` has one already.
        ValueError: an adapter or the large model's structure does not allow it, `batches` are missing, or there are
            some and the large model has no weights.
    """
    check_no_adapter(large)
    return plug_tensors(AdapterTensors(small), large, projections or Projections(), order, batches).model


def plug_tensors(
    source: AdapterTensors,
    large: nn.Module,
    projections: Projections,
    order: Order,
    batches: Iterable[Mapping[str, Any]] | None,
) -> AdapterTensors:
    """As `plug`, from tensors of the small model that were read already; returns those of the large one."""
    rule = "must be passed for projections that are fitted by least squares, and for no others"
    check("batches", batches, (batches is not None) == (projections.init == "least_squares"), rule)
    if batches is not None:
        check_has_weights("large", large, "least squares run it")
    layers = layer_map(depths(source.model.get_base_model()), depths(large), order)
    plugged = attach(large, {name: config_for(large, source, name, layers) for name in source.adapters})
    try:
        target = AdapterTensors(plugged)
        parametrize_all(target, source, layers, projections)
    except ValueError:
        plugged.unload()  # pyright: ignore[reportCallIssue]
        raise
    if batches is not None:
        align(projections, source.model, plugged, layers, batches)
    plugged.plug = projections
    return target


def parametrize_all(
    target: AdapterTensors, source: AdapterTensors, layers: list[int], projections: Projections
) -> None:
    """Parametrize each tensor of the large model by the corresponding one of the small model.

    Raises:
        ValueError: a tensor of one model has none in the other.
    """
    small, large = (type(tensors.model.get_base_model()).__name__ for tensors in (source, target))
    used: set[tuple[Any, ...]] = set()
    for tensor in target:
        layer = tensor.layer if tensor.layer == HEAD else layers[tensor.layer]
        other = next((other for other in source if tensor.corresponds_to(other, layer)), None)
        if other is None:
            raise ValueError(f"`small` (={small!r}) has no adapter tensor for {tensor.host} of the large model.")
        used.add(other.key)
        parametrize(tensor, other, steps(tensor, other, projections))
    left = sorted({other.host for other in source if other.key not in used and other.layer in {HEAD, *layers}})
    check("large", large, not left, f"has no module for the adapter at {', '.join(left[:3])}")


def check_no_adapter(large: nn.Module) -> None:
    """Refuse a large model that has an adapter already."""
    if isinstance(large, PeftModel):
        raise TypeError("`large` must be a model without adapters; its PeftModel can be unloaded.")


def depths(model: nn.Module) -> list[int]:
    """The number of layers of each stack.

    Raises:
        ValueError: no supported transformer blocks were found.
    """
    layers = [len(stack) for _, stack in stacks(model)]
    check("model", type(model).__name__, bool(layers), "must have supported transformer blocks, and none were found")
    return layers


def attach(model: nn.Module, configs: Mapping[str, PeftConfig]) -> PeftModel:
    """A model with a fresh adapter for each name, all of them active."""
    (first, config), *others = configs.items()
    adapted = get_peft_model(model, config, adapter_name=first)  # pyright: ignore[reportArgumentType]
    if others:
        tuner: Any = adapted.base_model
        try:
            for name, other in others:
                adapted.add_adapter(name, other)
            tuner.set_adapter(list(configs))
        except ValueError:
            tuner.unload()
            raise
    return adapted


def config_for(large: nn.Module, source: AdapterTensors, name: str, layers: list[int]) -> PeftConfig:
    """The config of a small model's adapter for the large model."""
    config = source.model.peft_config[name]
    tensors = [tensor for tensor in source if tensor.adapter == name]
    general: dict[str, Any] = {"base_model_name_or_path": None, "revision": None}  # peft names the new one
    if isinstance(config, PlacedConfig):
        rule = "must be None: the modules of the large model have other names; name sites instead"
        check("target_modules", config.target_modules, not config.target_modules, rule)
        if hasattr(config, "reduction_factor"):  # relative to the width of the model
            general |= {"reduction_factor": None, "r": bottleneck_size(tensors)}
        adapted = {tensor.layer for tensor in tensors}
        chosen = [i for i, layer in enumerate(layers) if layer in adapted]
        return replace(config, layers_to_transform=chosen, inference_mode=False, **general)
    assert isinstance(config, LoraConfig)
    return lora_config_for(large, source.model, config, name, lora_hosts(large, tensors, layers))


def lora_config_for(
    large: nn.Module, small: PeftModel, config: LoraConfig, name: str, hosts: dict[str, AdapterTensor]
) -> LoraConfig:
    """A LoRA config with the ranks and alphas of the small model's layers.

    Args:
        hosts: leaf of the large model -> A of the corresponding leaf of the small one.
    """
    adapted: Any = copy(config)
    others = [path for path, _ in own_modules(large) if path not in hosts]
    adapted.target_modules = _find_minimal_target_modules(list(hosts), others)
    ranks = {host: len(a.value) for host, a in hosts.items()}
    adapted.rank_pattern = {host: r for host, r in ranks.items() if r != config.r}
    leaf = small.get_base_model().get_submodule
    alphas = {host: cast(LoraLayer, leaf(a.host)).lora_alpha[name] for host, a in hosts.items()}
    adapted.alpha_pattern = {host: alpha for host, alpha in alphas.items() if alpha != config.lora_alpha}
    adapted.exclude_modules = adapted.layers_to_transform = adapted.layers_pattern = None
    adapted.fan_in_fan_out = any(isinstance(innermost(large.get_submodule(host)), Conv1D) for host in hosts)
    adapted.init_lora_weights, adapted.inference_mode = True, False
    adapted.base_model_name_or_path = adapted.revision = None
    return adapted


def bottleneck_size(tensors: Sequence[AdapterTensor]) -> int | None:
    """The width of the bottlenecks; None without any."""
    return next((len(tensor.value) for tensor in tensors if tensor.tensor == "Bottleneck.down.weight"), None)


def lora_hosts(large: nn.Module, tensors: Sequence[AdapterTensor], layers: list[int]) -> dict[str, AdapterTensor]:
    """The large model's leaves that correspond to leaves of the small one with LoRA, each with its LoRA's A."""
    hosts: dict[str, AdapterTensor] = {}
    for host, sites in leaf_sites(large).items():
        layer, names = sites[0].layer, {site.name for site in sites}
        assert layer is not None
        for tensor in tensors:
            if tensor.tensor == "A" and tensor.layer == layers[layer] and names <= tensor.sites:
                hosts[host] = tensor
    check("large", type(large).__name__, bool(hosts), "has no leaf where the small model has LoRA")
    return hosts


def steps(target: AdapterTensor, source: AdapterTensor, projections: Projections) -> list[Step]:
    """The projections from `source` to `target`: one step for each axis."""
    projected: list[Step] = []
    for axis, before in zip(target.axes, source.axes, strict=True):
        blocks: list[Block] = []
        for name, rows in axis.rows.items():
            d_from, d_to = space_width(source, before, name), space_width(target, axis, name)
            space: Space = (name, None if name == RESIDUAL else target.layer)
            blocks.append(Block(projections.between(space, axis.side, d_from, d_to), before.rows[name], rows))
        projected.append(Step(axis.dim, axis.size(target.value), blocks))
    return projected


def space_width(tensor: AdapterTensor, axis: Axis, space: str) -> int:
    """The number of a tensor's indices along an axis that belong to a space."""
    rows = axis.rows[space]
    return axis.size(tensor.value) if rows is None else len(rows)
