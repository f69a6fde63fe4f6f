"""Converts an ungated LoRA and (IA)^3 to the types of peft."""

from itertools import groupby
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.converted import ConvertedSublayer
from hf_peft_ext.loading.adapterhub.low_ranks import low_rank_sites
from hf_peft_ext.loading.adapterhub.names import kept
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.structure import innermost
from hf_peft_ext.validation.checks import check


def module_suffixes(hosts: list[str], model: Any) -> list[str]:
    """The shortest suffixes of module names that select these modules and no others, found by peft."""
    others = {name for name, _ in model.named_modules()} - {"", *hosts}
    return sorted(_find_minimal_target_modules(hosts, others))


def target_fields(hosts: list[str], model: Any) -> dict[str, Any]:
    """The config fields that name these modules, all of one class."""
    transposed = isinstance(innermost(model.get_submodule(hosts[0])), Conv1D)
    return {"target_modules": module_suffixes(hosts, model), "fan_in_fan_out": transposed}


def stock_lora(converted: list[ConvertedSublayer], model: Any) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config and the state of peft's LoRA. The n branches on a fused leaf become one branch of rank n r."""
    r, alpha, dropout = (converted[0].options[key] for key in ("r", "alpha", "dropout"))
    state: dict[str, Tensor] = {}
    branches: dict[str, int] = {}  # leaf -> number of branches
    for host, group in groupby(converted, lambda one: one.site.host):
        parts = list(group)
        state[f"{host}.lora_A.weight"] = torch.cat([one.tensors["A"] for one in parts])
        state[f"{host}.lora_B.weight"] = torch.cat([full_rows(one.tensors["B"], one.site) for one in parts], dim=1)
        branches[host] = len(parts)
    fused = {host.rpartition(".")[2]: n for host, n in branches.items() if n > 1}
    config = LoraConfig(
        **{"r": r, "lora_alpha": alpha, "lora_dropout": dropout},
        rank_pattern={leaf: n * r for leaf, n in fused.items()},
        alpha_pattern={leaf: n * alpha for leaf, n in fused.items()},
        **target_fields(list(branches), model),
    )
    return config, state


def add_dora(config: PeftConfig, state: dict[str, Tensor], checkpoint: Checkpoint, model: Any) -> None:
    """Make a LoRA a DoRA, y = m / |W + s B A| (W + s B A) x. The library's norm is |W + B A|: m is scaled to ours.

    Raises:
        ValueError: a leaf has a bias, which the library scales too, or several branches.
    """
    assert isinstance(config, LoraConfig)
    config.use_dora = True
    hosts = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    leaves: dict[str, Any] = {host: innermost(model.get_submodule(host)) for host in hosts}
    biased = next((host for host, leaf in leaves.items() if leaf.bias is not None), None)
    check("use_dora", True, biased is None, f"must be False where leaves have a bias, as {biased} has")
    for host, leaf in leaves.items():
        delta = state[f"{host}.lora_B.weight"] @ state[f"{host}.lora_A.weight"]
        weight = leaf.weight.detach().to(delta)
        m = checkpoint.take(f"{host}.loras.m.weight").flatten()
        check(f"size of m at {host}", len(m), len(m) == len(weight), f"must be {len(weight)}")
        ours, theirs = (torch.linalg.norm(weight + s * delta, dim=1) for s in (config.lora_alpha / config.r, 1.0))
        state[f"{host}.lora_magnitude_vector"] = m * ours / theirs


def full_rows(
    b: Tensor,  # shape: (d_out, r)
    site: Site,
) -> Tensor:  # shape: (width of the leaf, r)
    """B with zeros in the rows that the branch does not change."""
    return b if site.rows is None else b.new_zeros(site.width, b.shape[1]).index_copy(0, site.rows, b)


def stock_ia3(
    method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config and the state of peft's (IA)^3.

    The library scales outputs only, also those of the FFN's first leaf, and multiplies them by alpha.

    Raises:
        ValueError: the settings select no leaf, or a tensor is missing or has another size.
    """
    leaves = low_rank_sites(method, checkpoint, kept(method, model, sites))
    check("attn_matrices", method["attn_matrices"], bool(leaves), "selects nothing in this model")
    state = {}
    for host, group in leaves:
        name = f"{host}.loras.lora_B"
        scales = checkpoint.take(name).flatten()
        width, own = sum(site.d_out for site in group), group[0]
        check(f"size of {name}", len(scales), len(scales) == width, f"must be {width}")
        if own.rows is not None:
            rows = torch.cat([site.rows for site in group if site.rows is not None])
            scales = scales.new_ones(own.width).index_copy(0, rows, scales)
        state[f"{host}.ia3_l"] = method["alpha"] * scales.unsqueeze(1)
    return IA3Config(feedforward_modules=[], **target_fields([host for host, _ in leaves], model)), state
