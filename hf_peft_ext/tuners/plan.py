"""From placements and a model to the sites where sub-layers go, with every error found before anything changes."""

import re
from dataclasses import replace
from typing import cast

from torch import nn

from ..patterns import matching
from ..placement import Placement, check
from ..sites import Site, find_sites, override_sites, user_site
from ..structure import layer_of, layer_paths, leaf_size, own_modules
from .attach import child_name
from .attention import check_kernel
from .config import PlacedConfig

Plan = dict[str, list[tuple[Placement, Site]]]


def plan(model: nn.Module, config: PlacedConfig) -> Plan:
    """Host path -> the placements there, each with its site.

    Raises:
        ValueError: a placement has no site, a layer does not exist, two placements meet at one site, or the attention
            implementation cannot take a prefix.
    """
    sites = override_sites(model, find_sites(model), config.sites or {})
    n_layers = len(layer_paths(model)) or 1 + max((s.layer for s in sites if s.layer is not None), default=-1)
    targets = target_sites(model, config, sites)
    left_alone = excluded(model, config)
    found: Plan = {}
    for placement in limited(config, n_layers):
        named = [site for site in sites if site.serves(placement.site)]
        if targets is not None and placement.sublayer == "low_rank":
            named, targets = targets, []  # one branch on each target, however many sites the method names
            if not named:
                continue
        chosen = [site for site in named if placement.layers is None or site.layer in placement.layers]
        if not chosen:
            raise ValueError(no_site(model, placement, bool(named)))
        check_counted(placement, chosen, named)
        free = [site for site in chosen if not saved_whole(site, config)]
        rule = f"holds every place of `{placement.sublayer}` at `{placement.site}`: a module is saved whole or adapted"
        check("modules_to_save", config.modules_to_save, bool(free), rule)
        for site in free:
            if site.host in left_alone:
                continue
            check_gate(model, placement, site)
            if placement.sublayer == "prefix":
                check_kernel(model.get_submodule(site.host))
            here = found.setdefault(site.host, [])
            name = child_name(site.name, placement.sublayer)
            if any(child_name(s.name, p.sublayer) == name for p, s in here):
                raise ValueError(f"`placements` put `{placement.sublayer}` at `{site.name}` of {site.host} twice.")
            here.append((placement, site))
    check("exclude_modules", config.exclude_modules, bool(found), "leaves no site for any sub-layer")
    return found


def limited(config: PlacedConfig, n_layers: int) -> list[Placement]:
    """The config's placements, limited to `layers_to_transform`."""
    chosen, placements = cast(list[int] | None, config.layers_to_transform), config.to_placements()
    for name, layers in [("layers_to_transform", chosen), *(("layers", p.layers) for p in placements)]:
        for layer in layers or []:
            rule = f"names layer {layer}, which does not exist; this model has layers 0 to {n_layers - 1}"
            check(name, layers, 0 <= layer < max(n_layers, 1), rule)
    if chosen is None:
        return placements
    return [
        replace(p, layers=[i for i in (chosen if p.layers is None else p.layers) if i in chosen]) for p in placements
    ]


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


def excluded(model: nn.Module, config: PlacedConfig) -> frozenset[str]:
    """The modules that `exclude_modules` names."""
    return frozenset(matching(config.exclude_modules or [], (path for path, _ in model.named_modules())))


def saved_whole(site: Site, config: PlacedConfig) -> bool:
    """Whether a module that the site reads or changes lies in one that `modules_to_save` copies."""
    roots = [rf"(^|.*\.){re.escape(name)}($|\..*)" for name in config.modules_to_save or []]
    return any(re.match(root, path) for root in roots for path in (site.host, site.reads, site.attention))


def check_gate(model: nn.Module, placement: Placement, site: Site) -> None:
    """Refuse means over tokens where a site does not see the tokens of whole examples, or not which are padding."""
    if placement.gate in ("mean", "mean_padded") or (placement.gate == "auto" and not site.causal):
        rule = f"cannot take means at {site.host}, which lies in no block with attention; use 'token'"
        check("gate_pooling", placement.gate, bool(site.attention), rule)
        chunk = getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0)
        rule = "must be 0: gates cannot take means over chunks of an example; use gate_pooling='token'"
        check("chunk_size_feed_forward", chunk, not chunk, rule)


def check_counted(placement: Placement, chosen: list[Site], named: list[Site]) -> None:
    """Refuse prefixes that count positions in some layers of a stack only: T5's layers share one bias."""
    if placement.options.get("counts_positions"):
        hosts, stacks = {site.host for site in chosen}, {site.causal for site in chosen}
        whole = all(site.host in hosts for site in named if site.causal in stacks)
        check("layers", placement.layers, whole, "must hold every layer of a stack with `counts_positions`")


def no_site(model: nn.Module, placement: Placement, elsewhere: bool) -> str:
    name = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    if elsewhere:
        return (
            f"`layers` (={placement.layers}) holds no layer of this model where `{placement.sublayer}` has its site "
            f"`{placement.site}`."
        )
    if not layer_paths(model):
        lack = f"has no attention that is understood here, so `{placement.sublayer}` has no site"
    else:
        lack = f"has no place for `{placement.sublayer}` at `{placement.site}`"
    return f"Architecture '{name}' {lack}; leave it out or pass `sites=`."
