"""Imports that peft's own types can express: an ungated LoRA and (IA)^3."""

from itertools import groupby
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint, Settings
from hf_peft_ext.loading.adapterhub.converted import Filled, kept, low_rank_sites
from hf_peft_ext.model.sites import Site
from hf_peft_ext.model.structure import innermost
from hf_peft_ext.validation.checks import check


def endings(hosts: list[str], model: Any) -> list[str]:
    """The shortest endings of names that mean these modules and no others."""
    others = {name for name, _ in model.named_modules()} - {"", *hosts}
    return sorted(_find_minimal_target_modules(hosts, others))


def targets(hosts: list[str], model: Any) -> dict[str, Any]:
    transposed = isinstance(innermost(model.get_submodule(hosts[0])), Conv1D)
    return {"target_modules": endings(hosts, model), "fan_in_fan_out": transposed}


def stock_lora(filled: list[Filled], model: Any) -> tuple[PeftConfig, dict[str, Tensor]]:
    """peft's LoRA. The branches on a fused leaf become one of their joint rank, block by block."""
    r, alpha, dropout = (filled[0].options[key] for key in ("r", "alpha", "dropout"))
    state: dict[str, Tensor] = {}
    branches: dict[str, int] = {}  # leaf -> how many it has
    for host, group in groupby(filled, lambda one: one.site.host):
        parts = list(group)
        state[f"{host}.lora_A.weight"] = torch.cat([one.tensors["A"] for one in parts])
        state[f"{host}.lora_B.weight"] = torch.cat([widened(one.tensors["B"], one.site) for one in parts], dim=1)
        branches[host] = len(parts)
    fused = {host.rpartition(".")[2]: n for host, n in branches.items() if n > 1}
    config = LoraConfig(
        **{"r": r, "lora_alpha": alpha, "lora_dropout": dropout},
        rank_pattern={leaf: n * r for leaf, n in fused.items()},
        alpha_pattern={leaf: n * alpha for leaf, n in fused.items()},
        **targets(list(branches), model),
    )
    return config, state


def widened(
    b: Tensor,  # shape: (d_out, r)
    site: Site,
) -> Tensor:  # shape: (width of the leaf, r)
    """B with zeros in the rows that a branch leaves alone."""
    return b if site.rows is None else b.new_zeros(site.width, b.shape[1]).index_copy(0, site.rows, b)


def stock_ia3(
    method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """peft's (IA)^3. The library scales outputs, also those of the FFN's first leaf; alpha is a factor on them.

    Raises:
        ValueError: no leaf is named, or a tensor is missing or of another size.
    """
    leaves = low_rank_sites(method, model, kept(method, sites))
    check("attn_matrices", method["attn_matrices"], bool(leaves), "has no place in this model with these settings")
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
    return IA3Config(feedforward_modules=[], **targets([host for host, _ in leaves], model)), state
