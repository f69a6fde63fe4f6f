"""From a placement and a site to the sub-layer, in the widths of the site."""

from typing import Any

from torch import nn

from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.model.site import Site
from hf_peft_ext.sublayers import Bias, Bottleneck, Gate, LowRank, Prefix, ProjectedPrefix, Projection

# (num_virtual_tokens, d, encoder_hidden_size) -> the part of the reparameterisation that layers share
Projections = dict[tuple[int, int, int], Projection]


def build(placement: Placement, site: Site, projections: Projections) -> nn.Module:
    """The sub-layer of a placement at a site. Prefixes of one adapter share `projections`."""
    options = dict(placement.options)
    if placement.sublayer == "bias":
        return Bias(site.d_out)
    gate = make_gate(placement, site)
    if placement.sublayer == "low_rank":
        return LowRank(site.d_in, site.d_out, gate=gate, rows=site.rows, width=site.width, **options)
    if placement.sublayer == "bottleneck":
        return Bottleneck(site.d_in, gate=gate, **bottleneck_options(site, options))
    return prefix(site, gate, projections, **options)


def make_gate(placement: Placement, site: Site) -> Gate | None:
    if placement.gate is None:
        return None
    return Gate(site.d_in, pooling(placement, site), placement.gate_init)


def pooling(placement: Placement, site: Site) -> Any:
    """How a placement's gate is taken over the tokens at a site: "auto" decided, None for no gate."""
    if placement.gate != "auto":
        return placement.gate
    return "token" if site.causal or site.tokens != "examples" else "mean"


def bottleneck_options(site: Site, options: dict[str, Any]) -> dict[str, Any]:
    factor = options.pop("reduction_factor", None)
    return options if factor is None else {**options, "r": max(1, round(site.d_in / factor))}


def prefix(
    site: Site,
    gate: Gate | None,
    projections: Projections,
    num_virtual_tokens: int = 10,
    encoder_hidden_size: int | None = None,
    **options: Any,
) -> Prefix:
    shape = (site.heads, num_virtual_tokens, site.d_k, site.d_v)
    if encoder_hidden_size is None:
        return Prefix(*shape, gate=gate, **options)
    key = (num_virtual_tokens, site.d_in, encoder_hidden_size)
    if key not in projections:
        projections[key] = Projection(*key)
    return ProjectedPrefix(*shape, projections[key], gate=gate, **options)
