"""Converts the prefixes of a checkpoint."""

import math
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.converted import (
    ConvertedSublayer,
    activation_of,
    gate_pooling_of,
    linear,
    linear_state,
)
from hf_peft_ext.loading.adapterhub.names import prefix_gate_name, prefix_name
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.model.site import Site
from hf_peft_ext.validation.checks import check


def prefixes(method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]) -> Iterator[ConvertedSublayer]:
    """The prefixes of a method.

    Raises:
        ValueError: attention of this model takes none, a setting is not supported, or a tensor is missing or has
            another size.
    """
    stacks: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        if site.name in ("attention", "cross_attention"):
            stacks.setdefault(prefix_name(checkpoint, model, site), []).append(site)
    for (pool, name), stack_sites in stacks.items():
        if not method.get(name, True):  # settings of these names switch prefixes off
            continue
        rule = f"must be another method: attention of {type(model).__name__} takes no further keys and values"
        check("architecture", "prefix_tuning", all(site.act != "leaves" for site in stack_sites), rule)
        options: dict[str, Any] = {"num_virtual_tokens": method["prefix_length"], "form": "joint"}
        if any(hasattr(model.get_submodule(site.host), "has_relative_attention_bias") for site in stack_sites):
            left_out = method.get("leave_out")
            check("leave_out", left_out, not left_out, "must be empty for prefixes in T5, whose layers share a bias")
            options["shift_positions"] = True
        keys, values = prefix_vectors(method, checkpoint, f"{pool}prefix_tuning.prefix_tunings.{name}", stack_sites)
        for site, p_k, p_v in zip(stack_sites, keys, values, strict=True):
            tensors = {"P_K": p_k, "P_V": p_v}
            if method.get("use_gating"):
                tensors |= linear_state(checkpoint, prefix_gate_name(checkpoint, model, site), "gate")
            yield ConvertedSublayer("prefix", site, gate_pooling_of(method), options, tensors)


def prefix_vectors(
    method: Settings, checkpoint: Checkpoint, name: str, sites: list[Site]
) -> tuple[Tensor, Tensor]:  # shapes: (layers, heads, n_tokens, d_k), twice
    """The prefixes of a stack, computed by their reparameterisation network if there is one.

    Raises:
        ValueError: a tensor is missing or has another size.
    """
    if method.get("flat"):
        p = checkpoint.take(f"{name}.control_trans")
    else:
        hidden = F.linear(checkpoint.take(f"{name}.wte.weight"), *linear(checkpoint, f"{name}.control_trans.0"))
        p = F.linear(ACT2FN[activation_of(method)](hidden), *linear(checkpoint, f"{name}.control_trans.2"))
    shape = (method["prefix_length"], len(sites), 2, sites[0].heads, sites[0].d_k)
    rule = f"must be {' x '.join(map(str, shape))}: tokens, layers, keys and values, heads, width of a head"
    check(f"size of {name.rpartition('.')[2]}", p.numel(), p.numel() == math.prod(shape), rule)
    keys, values = p.view(shape).permute(2, 1, 3, 0, 4)
    return keys, values
