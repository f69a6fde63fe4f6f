"""Converts the bottlenecks of a checkpoint."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_peft_ext.attach.layer import child_name
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
    options = {"activation": activation_of(method), "dropout": dropout}
    if scaling == "channel":
        check_plain(method, "scaling", scaling)
    options["scaling"] = 1.0 if scaling == "channel" else scaling
    for site in (site for site in sites if site.name in names):
        name = bottleneck_name(checkpoint, model, site)
        if name is None and site.name == "cross_after_attention" and not method.get("cross_adapter"):
            continue  # only BERT's library code counts cross-attention's among those after attention
        name = name or f"{checkpoint.unrooted(site.host)}.adapters"
        tensors = matrices(method, checkpoint, name) | norm_tensors(method, checkpoint, name)
        if scaling == "learned":
            tensors["scaling"] = checkpoint.take(f"{name}.scaling").reshape(())
        if method.get("use_gating"):
            tensors |= linear_state(checkpoint, f"{name}.gate", "gate")
        own = options | {"r": len(tensors["down.bias"])} | phm_options(method) | norm_options(method)
        if scaling == "channel":
            tensors = scaled(tensors, output=checkpoint.take(f"{name}.scaling"))
        tensors = behind_layer_scale(method, model, site, tensors)
        yield ConvertedSublayer("bottleneck", site, gate_pooling_of(method), own, tensors)


def matrices(method: Settings, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Take W_down, W_up and their biases, or the factors of Compacter's."""
    places = {"down": f"{name}.adapter_down.{int(bool(method.get('ln_before')))}", "up": f"{name}.adapter_up"}
    if not method.get("phm_layer"):
        return linear_state(checkpoint, places["down"], "down") | linear_state(checkpoint, places["up"], "up")
    state = {}
    for part, place in places.items():  # the library's matrices are the transposed ones
        left, right = checkpoint.take(f"{place}.W_left"), checkpoint.take(f"{place}.W_right")
        state |= {f"{part}.s": right.mT.contiguous(), f"{part}.t": left.mT.contiguous()}
        width = right.shape[0] * right.shape[2]
        bias = checkpoint.take(f"{place}.b") if method.get("phm_bias", True) else torch.zeros(width)
        state[f"{part}.bias"] = bias
        if not method.get("shared_phm_rule", True):
            state[f"{part}.rule.factors"] = rule_factors(method, checkpoint, f"{place}.")
    return state


def rule_factors(method: Settings, checkpoint: Checkpoint, prefix: str) -> Tensor:  # shape: (n, n, n)
    """Take the left Kronecker factors at a place."""
    if method.get("factorized_phm_rule"):
        left, right = checkpoint.take(f"{prefix}phm_rule_left"), checkpoint.take(f"{prefix}phm_rule_right")
        return (left @ right).mT.contiguous()
    return checkpoint.take(f"{prefix}phm_rule").mT.contiguous()


def shared_rule(methods: list[Settings], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Take the Kronecker factors that all bottlenecks share; empty if there are none.

    An encoder-decoder of two models saves them twice.

    Raises:
        ValueError: the checkpoint lacks them.
    """
    method = next((one for one in methods if one.get("phm_layer") and one.get("shared_phm_rule", True)), None)
    if method is None:
        return {}
    pools = dict.fromkeys(match[1] for match in checkpoint.matches(r"((?:.*\.)?shared_parameters\.)phm_rule"))
    rule = "must be False here: the checkpoint lacks the shared factors, which the library does not save in T5"
    check("shared_phm_rule", True, bool(pools), rule)
    rules = [rule_factors(method, checkpoint, pool) for pool in pools]
    return {f"{child_name('shared', 'bottleneck')}.sublayer_of.factors": rules[0]}


def phm_options(method: Settings) -> dict[str, Any]:
    """The options of a bottleneck with Compacter's matrices; empty for others."""
    if not method.get("phm_layer"):
        return {}
    keys = {"phm_dim": 4, "phm_rank": 1, "shared_phm_rule": True}
    return {key: method.get(key, default) for key, default in keys.items()}


def norm_options(method: Settings) -> dict[str, Any]:
    """The options of a bottleneck with norms of its own; empty for others."""
    places = [place for place in ("before", "after") if method.get(f"ln_{place}")]
    return {"norm": "both" if len(places) == 2 else places[0]} if places else {}


def norm_tensors(method: Settings, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Take the norms of a bottleneck's own. The library saves the first one twice."""
    state = {}
    for place in ("before", "after"):
        if method.get(f"ln_{place}"):
            state |= linear_state(checkpoint, f"{name}.adapter_norm_{place}", f"norm_{place}")
    if method.get("ln_before"):
        linear_state(checkpoint, f"{name}.adapter_down.0", "again")
    return state


def scaled(tensors: dict[str, Tensor], output: Tensor, input: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of the bottleneck b f(a x), with a scale of the input's and one of the output's channels."""
    state = tensors | {"up.weight": tensors["up.weight"] * output[:, None], "up.bias": tensors["up.bias"] * output}
    if input is not None:
        state |= {name: tensors[name] * input for name in tensors.keys() & {"down.weight", "gate.weight"}}
    return state


def check_plain(method: Settings, setting: str, value: object) -> None:
    """Refuse scales of channels where the matrices are Kronecker products, or with a norm in between.

    Raises:
        ValueError: they cannot be multiplied into the matrices.
    """
    plain = not method.get("phm_layer") and not norm_options(method)
    check(setting, value, plain, "must be absent with `phm_layer`, `ln_before` or `ln_after`")


def bottleneck_sites(method: Settings, sites: list[Site], model: Any) -> list[str]:
    """The names of the bottlenecks' sites.

    A parallel one reads the residual stream; in pre-norm models this is before the norm.

    Raises:
        ValueError: a combination of settings is not supported.
    """
    after, rule = method.get("original_ln_after", True), "must be True without `original_ln_before`"
    check("original_ln_after", after, after or bool(method.get("original_ln_before")), rule)
    if method.get("is_parallel"):
        check("original_ln_after", after, after, "must be True with `is_parallel`")
        names = {"output_adapter": parallel_site(sites)}
    elif method.get("original_ln_before"):
        plus = not method.get("original_ln_after", True)  # AdapterPlus
        residual, rule = method.get("residual_before_ln", True), f"must be {not plus} with these norms"
        check("residual_before_ln", residual, residual is not plus and isinstance(residual, bool), rule)
        pre_norm = all(site.act == "output" for site in sites if site.name == "after_residual")
        check("original_ln_after", not plus, pre_norm or not plus, "must be True in models with norms after residuals")
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


def behind_layer_scale(method: Settings, model: Any, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the bottleneck f'(y) = f(l y) / l, where the block multiplies the output of its branch by l.

    The library's f adds to l y, after BEiT's layer scale; ours adds to y, before it.

    Raises:
        ValueError: an element of l is 0, or the bottleneck has other matrices.
    """
    assert site.layer is not None
    block, of_attention = model.get_submodule(layer_paths(model)[site.layer]), "attention" in site.name
    scale = getattr(block, "lambda_1" if of_attention else "lambda_2", None)
    if not isinstance(scale, Tensor) or site.name == "after_residual":
        return tensors
    check("layer_scale", 0.0, bool((scale != 0).all()), f"must not be 0 in {layer_paths(model)[site.layer]}")
    check_plain(method, "layer_scale", type(block).__name__)
    scale = scale.detach()
    reads = None if site.name.startswith("parallel_") else scale
    return scaled(tensors, output=1 / scale, input=reads)
