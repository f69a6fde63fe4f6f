"""Find the sites of a config's placements in a model. All errors are raised before the model is changed."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from peft import IA3Config
from torch import nn
from transformers.utils import logging

from hf_peft_ext.attach.attention import kernel_name
from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.layer import child_name
from hf_peft_ext.attach.make_sublayer import pooling
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.model.calls import ends_first, own_modules
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import find_sites, override_sites, user_site
from hf_peft_ext.model.structure import (
    WITHOUT_BLOCK_OUTPUT,
    expert_tensors,
    has_attention,
    is_norm,
    is_of,
    layer_of,
    layer_paths,
    leaf_size,
)
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.module_patterns import matching
from hf_peft_ext.validation.suggestions import ranges

Plan = dict[str, list[tuple[Placement, Site]]]
QKV = ("query", "key", "value")  # in layers without attention one leaf may serve for all three

logger: Any = logging.get_logger(__name__)


def plan(model: nn.Module, config: PlacedConfig) -> Plan:
    """Host path -> the placements there, each with its site. Layers that a placement does not reach are logged.

    Raises:
        ValueError: a placement has no site, a layer does not exist, two placements meet at one site, a site's widths
            do not fit the model, or the attention implementation cannot take a prefix.
    """
    planned, messages = resolve(model, config)
    for message in messages:
        logger.warning(message)
    return planned


def resolve(model: nn.Module, config: PlacedConfig) -> tuple[Plan, list[str]]:
    """The plan, and a message for each placement that does not reach some layers."""
    sites = override_sites(model, find_sites(model), config.sites or {})
    targets = target_sites(model, config, sites)
    unchanged = excluded(model, config)
    planned, messages = Plan(), list[str]()
    n_layers = layer_count(model, sites)
    for placement in limited(config, n_layers):
        named = served(placement, sites)
        if targets is not None and placement.sublayer == "low_rank":
            named, targets = targets, []  # one branch on each target, however many sites the method names
            if not named:
                continue
        elif message := unreached(placement, named, n_layers):
            messages.append(message)
        chosen = [site for site in named if placement.layers is None or site.layer in placement.layers]
        if not chosen:
            raise ValueError(
                no_site_message(model, placement.sublayer, placement.site, placement.layers if named else None)
            )
        check_counted(placement, chosen, named)
        free = [site for site in chosen if not saved_whole(site, config)]
        rule = f"holds every place of `{placement.sublayer}` at `{placement.site}`: a module is saved whole or adapted"
        check("modules_to_save", config.modules_to_save, bool(free), rule)
        for site in free:
            if unchanged.isdisjoint((site.host, site.reads) if site.act == "leaves" else (site.host,)):
                check_gate(model, placement, site)
                check_fit(model, placement, site)
                put(planned.setdefault(site.host, []), placement, site)
    check("exclude_modules", config.exclude_modules, bool(planned), "leaves no site for any sub-layer")
    return planned, messages


def put(here: list[tuple[Placement, Site]], placement: Placement, site: Site) -> None:
    """Add a placement to those of a host, once: layers may share a module, and roles may share a leaf.

    Raises:
        ValueError: another placement has put the same kind of sub-layer at the same site.
    """
    name = child_name(site.name, placement.sublayer)
    for other, taken in here:
        if other is placement and taken.layer != site.layer:  # a module that two layers share
            return
        if "mixer_input" == site.name == taken.name and {placement.site, other.site} <= set(QKV):
            return
        if child_name(taken.name, other.sublayer) == name:
            raise ValueError(f"`placements` put `{placement.sublayer}` at `{site.name}` of {site.host} twice.")
    here.append((placement, site))


def served(placement: Placement, sites: list[Site]) -> list[Site]:
    """The sites of a placement. Where a layer has no leaf for a role, its mixer's input projection serves."""
    named = [site for site in sites if site.serves(placement.site)]
    if placement.sublayer == "low_rank" and placement.site in QKV:
        layers = {site.layer for site in named}
        named += [site for site in sites if site.name == "mixer_input" and site.layer not in layers]
    elif placement.sublayer == "prefix":
        named = prefix_sites(placement, named)
    return named


def prefix_sites(placement: Placement, sites: list[Site]) -> list[Site]:
    """The attention modules that take a prefix of this form; one with a softmax of its own sits at the query leaf."""
    if placement.gate:  # a gate would mix packed examples, unlike a kernel
        sites = [site for site in sites if site.tokens != "packed"]
    if placement.options.get("form", "separate") != "separate":
        return [site for site in sites if site.act != "leaves"]
    return [
        replace(site, host=site.query, reads=site.host, d_in=site.d_query, act="leaves")
        for site in sites
        if site.query
    ]


def unreached(placement: Placement, named: list[Site], n_layers: int) -> str | None:
    """A message about the layers in which a placement has no site; None if it reaches all or none of its layers."""
    reached = {site.layer for site in named}
    wanted = range(n_layers) if placement.layers is None else placement.layers
    left = [layer for layer in wanted if layer not in reached]
    if not left or not any(layer in reached for layer in wanted) or placement.site.startswith("cross_"):
        return None
    at = "" if placement.sublayer == placement.site else f" at `{placement.site}`"
    return f"`{placement.sublayer}`{at} has no place in layers {ranges(left)} of {n_layers}; the others have it."


def limited(config: PlacedConfig, n_layers: int) -> list[Placement]:
    """The config's placements, limited to `layers_to_transform`."""
    chosen, placements = cast(list[int] | None, config.layers_to_transform), config.to_placements()
    for name, layers in [("layers_to_transform", chosen), *(("layers", p.layers) for p in placements)]:
        check_layers(name, layers, n_layers)
    if chosen is None:
        return placements
    return [
        replace(p, layers=[i for i in (chosen if p.layers is None else p.layers) if i in chosen]) for p in placements
    ]


def layer_count(model: nn.Module, sites: list[Site]) -> int:
    """The number of layers, by the model's blocks or by the sites that a user names."""
    return len(layer_paths(model)) or 1 + max((s.layer for s in sites if s.layer is not None), default=-1)


def check_layers(name: str, layers: list[int] | None, n_layers: int) -> None:
    """Refuse indices of layers that do not exist."""
    for layer in layers or []:
        rule = f"names layer {layer}, which does not exist; this model has layers 0 to {n_layers - 1}"
        check(name, layers, 0 <= layer < max(n_layers, 1), rule)


def target_sites(model: nn.Module, config: PlacedConfig, sites: list[Site]) -> list[Site] | None:
    """The leaves that `target_modules` names, or None if it names none.

    Raises:
        ValueError: it matches no linear leaf.
    """
    pattern, layers, modules = config.target_modules, layer_paths(model), dict(own_modules(model))
    if not pattern:
        return None
    leaves = {path: layer_of(path, layers) for path, module in modules.items() if path and leaf_size(module)}
    if pattern == "all-linear":
        hosts = [path for path, layer in leaves.items() if layer is not None]
    else:
        hosts = matching(pattern, leaves)
    check("target_modules", pattern, bool(hosts), f"matches no linear leaf of {type(model).__name__}")
    return [user_site("target", path, modules, leaves[path], sites) for path in hosts]


def excluded(model: nn.Module, config: PlacedConfig | IA3Config) -> frozenset[str]:
    """The modules that `exclude_modules` names."""
    return frozenset(matching(config.exclude_modules or [], (path for path, _ in model.named_modules())))


def saved_whole(site: Site, config: PlacedConfig | IA3Config) -> bool:
    """Whether a module that the site reads or changes lies in one that `modules_to_save` copies."""
    roots = [rf"(^|.*\.){re.escape(name)}($|\..*)" for name in config.modules_to_save or []]
    return any(re.match(root, path) for root in roots for path in (site.host, site.reads, site.output, site.attention))


def check_gate(model: nn.Module, placement: Placement, site: Site) -> None:
    """Refuse gates by mean at sites that do not read whole examples, or cannot tell padding."""
    if pooling(placement, site) in ("mean", "mean_padded"):
        rule = f"cannot take means at {site.host}, which lies in no block with attention; use 'token'"
        check("gate_pooling", placement.gate, bool(site.attention), rule)
        why = "padding cannot be read" if site.tokens == "unread" else "rows are not whole examples"
        rule = f"cannot take means at {site.host}, whose {why}; use 'token'"
        check("gate_pooling", placement.gate, site.tokens == "examples", rule)
        chunk = getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0)
        rule = "must be 0: gates cannot take means over chunks of an example; use gate_pooling='token'"
        check("chunk_size_feed_forward", chunk, not chunk, rule)


def check_fit(model: nn.Module, placement: Placement, site: Site) -> None:
    """Refuse a site whose modules have the wrong widths or run in the wrong order for the sub-layer."""
    at = f"Architecture '{name_of(model)}' has no place for `{placement.sublayer}` at `{site.name}` of {site.host}"
    if placement.sublayer == "prefix" and site.act == "attention":
        kernel_name(model.get_submodule(site.host))
    if site.act == "span" and ends_first(model, site.reads, site.host):
        raise ValueError(f"{at}, which runs before {site.reads}, whose input it should read; leave it out.")
    (d_in, _), (_, d_out) = (widths(model.get_submodule(path)) for path in (site.reads or site.host, site.host))
    wrong = [f"{ours} for {size}" for ours, size, acts in (
        (site.d_in, d_in, ("input", "span")), (site.width or site.d_out, d_out, ("input", "output", "norm", "span")),
    ) if size not in (None, ours) and site.act in acts]  # fmt: skip
    if placement.sublayer == "bottleneck" and site.d_in != site.d_out:
        wrong.append(f"{site.d_in} for {site.d_out}")
    if placement.sublayer == "intervention":
        r = placement.options.get("r", 4)
        check("r", r, r <= site.d_in, f"must be at most {site.d_in}, the width at {site.host}")
        if is_of(model.get_submodule(site.host), WITHOUT_BLOCK_OUTPUT):
            raise ValueError(f"{at}, which does not return one tensor of its own width; leave it out.")
    n = placement.options.get("phm_dim") or 1
    check("phm_dim", n, site.d_in % n == 0, f"must divide {site.d_in}, the width at {site.host}")
    if wrong:
        raise ValueError(f"{at}, whose widths are others ({', '.join(wrong)}); leave it out or pass `sites=`.")


def widths(module: Any) -> tuple[int | None, int | None]:
    """Input and output width of a leaf or a norm; None for other modules."""
    d = len(module.weight) if is_norm(module) else None
    return leaf_size(module) or (d, d)


def check_counted(placement: Placement, chosen: list[Site], named: list[Site]) -> None:
    """Refuse prefixes that shift positions in some layers of a stack only: T5's layers share one bias."""
    if placement.options.get("shift_positions"):
        hosts, stacks = {site.host for site in chosen}, {site.causal for site in chosen}
        whole = all(site.host in hosts for site in named if site.causal in stacks)
        check("layers", placement.layers, whole, "must hold every layer of a stack with `shift_positions`")


def name_of(model: nn.Module) -> str:
    """The model type of transformers, or the name of the class."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def no_site_message(model: nn.Module, sublayer: str, site: str, layers: list[int] | None) -> str:
    """The error for a sub-layer that has no site, or has sites only outside the chosen `layers`."""
    if layers is not None:
        return f"`layers` (={layers}) holds no layer of this model where `{sublayer}` has its site `{site}`."
    if not layer_paths(model) or (sublayer == "prefix" and not has_attention(model)):
        lack = f"has no attention blocks in which `{sublayer}` could be placed"
    else:
        lack = f"has no place for `{sublayer}` at `{site}`"
    message = f"Architecture '{name_of(model)}' {lack}; leave it out or pass `sites=`."
    if site.startswith("ffn_") and any(map(expert_tensors, in_blocks(model))):
        message += " Its experts are one tensor: `find_target_parameters(model)` names them for peft's LoRA."
    return message


def in_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of the blocks of a model."""
    return (module for path in layer_paths(model) for module in model.get_submodule(path).modules())
