"""Puts the adapter of a small model on a large one, each tensor seen through W_plug."""

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
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import innermost, own_modules, stacks
from hf_peft_ext.transfer.bridges.activations import check_weights
from hf_peft_ext.transfer.map.adapter_tensors import HEAD, READS, WRITES, Axis, Part, parts_of
from hf_peft_ext.transfer.map.alignment import align
from hf_peft_ext.transfer.map.parametrize import Block, Step, parametrize
from hf_peft_ext.transfer.map.projections import RESIDUAL, Order, Projections, Space, layer_map
from hf_peft_ext.validation.checks import check


def plug(
    small: PeftModel,
    large: nn.Module,
    projections: Projections | None = None,
    order: Order = "interleaved",
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> PeftModel:
    """The large model with the small one's adapter: the same kind, with tensors that are seen through W_plug.

    Each layer of the large model has a copy of the tensors of its layer in the small one, in the small one's widths,
    and W_plug makes of them the tensors that the adapter works with. What is trainable are the copies, and the
    projections if they are. `merge_projections` makes plain tensors of it. A classification head that was
    trained with the adapter comes along.

    Args:
        small: a model with a LoRA, or with an adapter of this package's own (bottlenecks, prefixes, low-rank branches,
            their gates) as the one active adapter; others that it has stay out. It stays as it is.
        large: a model with its own parameters frozen from here on. It may be one without weights, built in
            `with torch.device("meta")`, to be trained in a `bridge` and loaded onto the real one when it is folded.
        projections: W_plug; None for random orthogonal ones that are trained.
        order: which layer comes from which where depths differ, see `projections.layer_map`.
        batches: inputs of both models without padding, for projections that begin by least squares.

    Raises:
        TypeError: the adapter is of a kind that cannot be plugged in, or `large` has one already.
        ValueError: several adapters are active, the adapter or the large model's structure does not allow it,
            `batches` are missing, or there are some and the large model has no weights.
    """
    check_one_active(small)
    check_no_adapter(large)
    projections = Projections() if projections is None else projections
    rule = "are needed by projections that begin by least squares, and by no others"
    check("batches", batches, (batches is not None) == (projections.init == "least_squares"), rule)
    if batches is not None:
        check_weights("large", large, "least squares run it")
    given = parts_of(small)
    layers = layer_map(depths(small.get_base_model()), depths(large), order)
    base = small.get_base_model()
    plugged = get_peft_model(large, config_for(large, small, given, layers))  # pyright: ignore
    taken: set[int] = set()
    try:
        for part in parts_of(plugged):
            layer = part.layer if part.layer == HEAD else layers[part.layer]
            index = next((i for i, other in enumerate(given) if part.takes_from(other, layer)), -1)
            check("small", type(base).__name__, index >= 0, f"has nothing to plug in at {part.host}")
            taken.add(index)
            parametrize(part, given[index], steps(part, given[index], projections))
        left = [given[i].host for i in set(range(len(given))) - taken if given[i].layer in {HEAD, *layers}]
        check("large", type(large).__name__, not left, f"has no place for what sits at {', '.join(sorted(left)[:3])}")
    except ValueError:
        plugged.unload()  # pyright: ignore[reportCallIssue]
        raise
    if batches is not None:
        align(projections, small, plugged, layers, batches)
    plugged.plug = projections
    return plugged


def check_no_adapter(large: nn.Module) -> None:
    """Refuse a large model that has an adapter already."""
    if isinstance(large, PeftModel):
        raise TypeError("`large` must be a model without adapters; its PeftModel can be unloaded.")


def check_one_active(small: PeftModel) -> None:
    """Refuse a small model in which several adapters act: one of them alone would come over.

    Raises:
        ValueError: not one adapter is active, or another than `small.active_adapter` was made so behind peft's back.
    """
    active = list(small.active_adapters)
    rule = "must be one, set by `small.set_adapter`; make one of several LoRAs by peft's `add_weighted_adapter`"
    check("active_adapters", active, active == [small.active_adapter], rule)


def depths(model: nn.Module) -> list[int]:
    """The number of layers of each stack.

    Raises:
        ValueError: the model has none that is understood.
    """
    found = [len(stack) for _, stack in stacks(model)]
    check("model", type(model).__name__, bool(found), "has no stack of blocks with attention that is understood here")
    return found


def config_for(large: nn.Module, small: PeftModel, given: Sequence[Part], layers: list[int]) -> PeftConfig:
    """The config of the same adapter on the large model."""
    config = small.active_peft_config
    has = {part.layer for part in given}
    chosen = [i for i, layer in enumerate(layers) if layer in has]
    general: dict[str, Any] = {"base_model_name_or_path": None, "revision": None}  # peft names the new one
    if isinstance(config, PlacedConfig):
        rule = "must be None: the modules of the large model have other names; name sites instead"
        check("target_modules", config.target_modules, not config.target_modules, rule)
        if hasattr(config, "reduction_factor"):  # a width relative to the model's is another one there
            general |= {"reduction_factor": None, "r": code_width(given)}
        return replace(config, layers_to_transform=chosen, inference_mode=False, **general)
    assert isinstance(config, LoraConfig)
    found: Any = copy(config)
    hosts = lora_hosts(large, given, layers)
    others = [path for path, _ in own_modules(large) if path not in hosts]
    found.target_modules = _find_minimal_target_modules(list(hosts), others)
    ranks = {host: len(a.value) for host, a in hosts.items()}
    found.rank_pattern = {host: r for host, r in ranks.items() if r != config.r}
    layer_of, name = small.get_base_model().get_submodule, small.active_adapter
    alphas = {host: cast(LoraLayer, layer_of(a.host)).lora_alpha[name] for host, a in hosts.items()}
    found.alpha_pattern = {host: alpha for host, alpha in alphas.items() if alpha != config.lora_alpha}
    found.exclude_modules = found.layers_to_transform = found.layers_pattern = None
    found.fan_in_fan_out = any(isinstance(innermost(large.get_submodule(host)), Conv1D) for host in hosts)
    found.init_lora_weights, found.inference_mode = True, False
    for name, value in general.items():
        setattr(found, name, value)
    return found


def code_width(given: Sequence[Part]) -> int | None:
    """The width of the bottlenecks."""
    widths = {len(part.value) for part in given if part.tensor == "Bottleneck.down.weight"}
    return widths.pop() if widths else None


def lora_hosts(large: nn.Module, given: Sequence[Part], layers: list[int]) -> dict[str, Part]:
    """The leaves of the large model that stand where the small one has LoRA, each with the A that it gets."""
    sites: dict[str, set[str]] = {}
    layer_at: dict[str, int] = {}
    for site in find_sites(large):
        if site.act == "input" and site.layer is not None and site.name.removeprefix("cross_") in {*READS, *WRITES}:
            sites.setdefault(site.host, set()).add(site.name)
            layer_at[site.host] = site.layer
    found: dict[str, Part] = {}
    for host, names in sites.items():
        for part in given:
            if part.tensor == "A" and part.layer == layers[layer_at[host]] and names <= part.sites:
                found[host] = part
    check("large", type(large).__name__, bool(found), "has no leaf where the small model has LoRA")
    return found


def steps(part: Part, source: Part, projections: Projections) -> list[Step]:
    """How `part` is made of `source`: for each dimension along the model, what projects which of its rows."""
    found: list[Step] = []
    for axis, before in zip(part.axes, source.axes, strict=True):
        blocks: list[Block] = []
        for name, rows in axis.rows.items():
            d_from, d_to = (width(p, a, name) for p, a in ((source, before), (part, axis)))
            where: Space = (name, None if name == RESIDUAL else part.layer)
            blocks.append(Block(projections.between(where, axis.side, d_from, d_to), before.rows[name], rows))
        found.append(Step(axis.dim, size(part, axis), blocks))
    return found


def size(part: Part, axis: Axis) -> int:
    shape = part.value.shape
    return shape[0] * shape[2] if axis.dim is None else shape[axis.dim]


def width(part: Part, axis: Axis, name: str) -> int:
    rows = axis.rows[name]
    return size(part, axis) if rows is None else len(rows)
