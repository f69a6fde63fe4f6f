"""The library's names for the places of a model, found by its structure and the names in the checkpoint."""

import re
from typing import Any

from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.structure import covers, is_cross, layer_paths
from hf_peft_ext.validation.checks import check

# site -> what its bottleneck is called after; all others are called "output"
BOTTLENECK_ROLES = {
    "after_attention": "attention",
    "parallel_attention": "attention",
    "cross_after_attention": "cross_attention",
}


def kept(method: Settings, model: Any, sites: list[Site]) -> list[Site]:
    """The sites in the layers of a method.

    Raises:
        ValueError: `leave_out` names every layer.
    """
    left_out = method.get("leave_out") or []
    numbers = layer_numbers(model)
    sites = [site for site in sites if site.layer is not None and numbers[site.layer] not in left_out]
    check("leave_out", left_out, bool(sites), "must leave at least one layer")
    return sites


def layer_numbers(model: Any) -> list[int]:
    """The library's number of each layer. In an encoder-decoder of two models it counts each from 0."""
    paths = layer_paths(model)
    if model.config.model_type != "encoder-decoder":
        return list(range(len(paths)))
    return [int(path.rpartition(".")[2]) for path in paths]


def bottleneck_name(checkpoint: Checkpoint, model: Any, site: Site) -> str | None:
    """The library's name for the bottleneck of a site; None if the checkpoint has none there."""
    assert site.layer is not None
    path = checkpoint.unrooted(layer_paths(model)[site.layer])
    matches = checkpoint.matches(rf"{re.escape(path)}\.(.+?\.adapters)\.adapter_up\.")
    for name in dict.fromkeys(match[1] for match in matches):
        if bottleneck_role(model, layer_paths(model)[site.layer], name) == BOTTLENECK_ROLES.get(site.name, "output"):
            return f"{path}.{name}"
    return None


def bottleneck_role(model: Any, layer: str, name: str) -> str:
    """What a bottleneck follows, by its path in the layer and what else its holder has (T5's have numbers)."""
    holder: Any = model.get_submodule(layer)
    for part in name.split("."):
        holder = getattr(holder, part, None)
        if holder is None:
            break
        name += "".join(f".{child}" for child, _ in holder.named_children() if "ttention" in child)
    if is_cross(name):
        return "cross_attention"
    return "attention" if "attention" in name.lower() else "output"


def prefix_name(checkpoint: Checkpoint, model: Any, site: Site) -> tuple[str, str]:
    """The library's pool and its name there for the prefixes of an attention module's stack."""
    tables = [
        (match[1] or "", match[2]) for match in checkpoint.matches(r"(.*\.)?prefix_tuning\.prefix_tunings\.(\w+)\.")
    ]
    path = checkpoint.unrooted(site.host)
    own = [(pool, name) for pool, name in dict.fromkeys(tables) if not pool or covers((pool.rstrip("."),), path)]
    kind = getattr(getattr(model.get_submodule(site.host), "config", None), "model_type", "")
    if site.name == "cross_attention":
        candidates = ["cross_prefix"]
    elif has_two_stacks(model) and not site.causal:
        candidates = ["encoder_prefix"]
    else:
        candidates = ["self_prefix", "self", f"{kind}_self_prefix"]  # DistilBERT and CLIP have names of their own
    return next(((pool, name) for pool, name in own if name in candidates), ("", candidates[0]))


def has_two_stacks(model: Any) -> bool:
    """Whether encoder and decoder are parts of one model, as in T5 and BART."""
    return bool(model.config.is_encoder_decoder) and model.config.model_type != "encoder-decoder"


def prefix_gate_name(checkpoint: Checkpoint, model: Any, site: Site) -> str:
    """The library's name for the gate of the prefix at an attention module."""
    assert site.layer is not None
    layer = checkpoint.unrooted(layer_paths(model)[site.layer])
    for match in checkpoint.matches(rf"({re.escape(layer)}\.(.*)\.prefix_tuning\.prefix_gates)\.weight"):
        if is_cross(match[2]) == site.name.startswith("cross_"):
            return match[1]
    return f"{checkpoint.unrooted(site.host)}.prefix_tuning.prefix_gates"
