"""Converts the bottlenecks of a checkpoint."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.converted import (
    ConvertedSublayer,
    activation_of,
    gate_pooling_of,
    linear_state,
)
from hf_peft_ext.loading.adapterhub.names import bottleneck_name
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.structure import layer_paths
from hf_peft_ext.validation.checks import check


def bottlenecks(
    method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]
) -> Iterator[ConvertedSublayer]:
    """The bottlenecks of a method.

    Raises:
        ValueError: a setting is not supported, or a tensor is missing or has another shape.
    """
    names = bottleneck_sites(method, sites, model)
    dropout, scaling = method.get("dropout", 0.0), method.get("scaling", 1.0)
    check("scaling", scaling, scaling != "channel", 'must be a number or "learned"')
    options = {"activation": activation_of(method), "dropout": dropout, "scaling": scaling}
    for site in (site for site in sites if site.name in names):
        name = bottleneck_name(checkpoint, model, site)
        if name is None and site.name == "cross_after_attention" and not method.get("cross_adapter"):
            continue  # only BERT's library code counts cross-attention's among those after attention
        name = name or f"{checkpoint.unrooted(site.host)}.adapters"
        tensors = linear_state(checkpoint, f"{name}.adapter_down.0", "down")
        tensors |= linear_state(checkpoint, f"{name}.adapter_up", "up")
        if scaling == "learned":
            tensors["scaling"] = checkpoint.take(f"{name}.scaling").reshape(())
        if method.get("use_gating"):
            tensors |= linear_state(checkpoint, f"{name}.gate", "gate")
        r = len(tensors["down.bias"])
        tensors = behind_layer_scale(model, site, tensors)
        yield ConvertedSublayer("bottleneck", site, gate_pooling_of(method), {"r": r, **options}, tensors)


def bottleneck_sites(method: Settings, sites: list[Site], model: Any) -> list[str]:
    """The names of the bottlenecks' sites.

    A parallel one reads the residual stream; in pre-norm models this is before the norm.

    Raises:
        ValueError: a combination of settings is not supported.
    """
    if method.get("is_parallel"):
        names = {"output_adapter": parallel_site(sites)}
    elif method.get("original_ln_before"):
        residual = method.get("residual_before_ln", True)
        check("residual_before_ln", residual, residual is True, "must be True with `original_ln_before`")
        names = {"output_adapter": "after_residual"}
    else:
        # ALBERT's library code swaps the input and the output of attention
        attention = "parallel_attention" if model.config.model_type == "albert" else "after_attention"
        names = {"mh_adapter": attention, "cross_adapter": "cross_after_attention", "output_adapter": "after_ffn"}
    for key in ("mh_adapter", "cross_adapter"):
        rule = "must be False with `is_parallel` or `original_ln_before`"
        check(key, method.get(key), not method.get(key) or key in names, rule)
    chosen = [name for key, name in names.items() if method.get(key)]
    return [*chosen, "cross_after_attention"] if "after_attention" in chosen else chosen


def parallel_site(sites: list[Site]) -> str:
    """The site of a parallel bottleneck.

    Raises:
        ValueError: attention and FFN run side by side, as in GPT-J, so that no module reads the residual between them.
    """
    names = {site.name for site in sites}
    pre_norm = any(site.name == "after_residual" and site.act == "output" for site in sites)
    rule = "must be False in this model, where no norm reads the residual stream in front of the FFN"
    check("is_parallel", True, not pre_norm or "parallel_residual" in names, rule)
    return "parallel_residual" if pre_norm else "parallel_ffn"


def behind_layer_scale(model: Any, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the bottleneck f'(y) = f(l y) / l, where the block multiplies the output of its branch by l.

    The library's f adds to l y, after BEiT's layer scale; ours adds to y, before it.

    Raises:
        ValueError: an element of l is 0.
    """
    assert site.layer is not None
    block, of_attention = model.get_submodule(layer_paths(model)[site.layer]), "attention" in site.name
    scale = getattr(block, "lambda_1" if of_attention else "lambda_2", None)
    if not isinstance(scale, Tensor) or site.name == "after_residual":
        return tensors
    check("layer_scale", 0.0, bool((scale != 0).all()), f"must not be 0 in {layer_paths(model)[site.layer]}")
    scale = scale.detach()
    state = tensors | {"up.weight": tensors["up.weight"] / scale[:, None], "up.bias": tensors["up.bias"] / scale}
    if not site.name.startswith("parallel_"):
        reads = tensors.keys() & {"down.weight", "gate.weight"}
        state |= {name: tensors[name] * scale for name in reads}
    return state
