"""From a placement and a site to the sub-layer, in the widths of the site."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.model.site import Site
from hf_peft_ext.sublayers import (
    Bias,
    Bottleneck,
    Coupling,
    ExpertSharing,
    Gate,
    Intervention,
    LowRank,
    MixtureBottleneck,
    NormedBottleneck,
    OwnNorm,
    PHMBottleneck,
    PHMRule,
    Prefix,
    ProjectedPrefix,
    Projection,
    SoftPrompt,
)
from hf_peft_ext.sublayers.phm import rule_std


@dataclass
class SharedParts:
    """What the sub-layers of one adapter share.

    Args:
        projections: (num_virtual_tokens, d, encoder_hidden_size) -> the part of the prefixes' reparameterisation.
        rule: the Kronecker factors of its PHM bottlenecks.
    """

    projections: dict[tuple[int, int, int], Projection] = field(default_factory=dict)
    rule: PHMRule | None = None


def build(placement: Placement, site: Site, shared: SharedParts) -> nn.Module:
    """The sub-layer of a placement at a site. It takes from `shared` what is there, and adds what is missing."""
    options = dict(placement.options)
    if placement.sublayer == "bias":
        return Bias(site.d_out)
    if placement.sublayer == "coupling":
        return Coupling(site.d_out, **options)
    if placement.sublayer == "prompt":
        return SoftPrompt(options.pop("num_virtual_tokens", 10), site.d_out, **options)
    if placement.sublayer == "intervention":
        return Intervention(site.d_out, **options)
    gate = make_gate(placement, site)
    if placement.sublayer == "low_rank":
        return LowRank(site.d_in, site.d_out, gate=gate, rows=site.rows, width=site.width, **options)
    if placement.sublayer == "bottleneck":
        return bottleneck(site, gate, shared, **options)
    return prefix(site, gate, shared, **options)


def make_gate(placement: Placement, site: Site) -> Gate | None:
    if placement.gate is None:
        return None
    return Gate(site.d_in, pooling(placement, site), placement.gate_init)


def pooling(placement: Placement, site: Site) -> Any:
    """How a placement's gate is taken over the tokens at a site: "auto" decided, None for no gate."""
    if placement.gate != "auto":
        return placement.gate
    return "token" if site.causal or site.tokens != "examples" else "mean"


def bottleneck(
    site: Site,
    gate: Gate | None,
    shared: SharedParts,
    r: int | None = None,
    reduction_factor: float | None = None,
    phm_dim: int | None = None,
    shared_phm_rule: bool = True,
    num_experts: int | None = None,
    shared_projection: ExpertSharing = "none",
    norm: OwnNorm | None = None,
    **options: Any,
) -> Bottleneck:
    n = phm_dim or 1  # widths are multiples of n
    if reduction_factor is not None:
        r = n * max(1, round(site.d_in / reduction_factor / n))
    assert r is not None  # `Placement` has checked it
    if num_experts is not None:
        return MixtureBottleneck(site.d_in, r, num_experts, shared_projection, gate=gate, **options)
    if norm is not None:
        return NormedBottleneck(site.d_in, r=r, gate=gate, norm=norm, **options)
    if phm_dim is None:
        return Bottleneck(site.d_in, r, gate=gate, **options)
    if shared_phm_rule and shared.rule is None:
        shared.rule = PHMRule(n, rule_std(n, options.get("init", "lora")))
    rule = shared.rule if shared_phm_rule else None
    return PHMBottleneck(site.d_in, r, n, rule=rule, gate=gate, **options)


def prefix(
    site: Site,
    gate: Gate | None,
    shared: SharedParts,
    num_virtual_tokens: int = 10,
    encoder_hidden_size: int | None = None,
    **options: Any,
) -> Prefix:
    shape = (site.heads, num_virtual_tokens, site.d_k, site.d_v)
    if encoder_hidden_size is None:
        return Prefix(*shape, gate=gate, **options)
    key = (num_virtual_tokens, site.d_in, encoder_hidden_size)
    if key not in shared.projections:
        shared.projections[key] = Projection(*key)
    return ProjectedPrefix(*shape, shared.projections[key], gate=gate, **options)
