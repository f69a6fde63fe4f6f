"""Converts the methods of a checkpoint to sub-layers at sites of the model, with their tensors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from hf_peft_ext.attach.make_sublayer import SharedParts, build
from hf_peft_ext.attach.placement import GatePooling, Placement
from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint, Settings
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.structure import layer_paths
from hf_peft_ext.validation.checks import check

ATTENTION_MATRICES = {"q": "query", "k": "key", "v": "value"}


@dataclass
class ConvertedSublayer:
    """A sub-layer at a site.

    Args:
        sublayer: "bottleneck", "low_rank" or "prefix".
        site: where it is attached.
        gate: the pooling of its gate; None without one.
        options: of the placement.
        tensors: by their names in the sub-layer.

    Raises:
        ValueError: a tensor has another shape than the sub-layer at this site.
    """

    sublayer: str
    site: Site
    gate: GatePooling | None
    options: dict[str, Any]
    tensors: dict[str, Tensor]

    def placement(self) -> Placement:
        """The placement that this sub-layer belongs to."""
        return Placement(self.sublayer, self.site.name.removeprefix("cross_"), gate=self.gate, options=self.options)

    def __post_init__(self) -> None:
        with torch.device("meta"):
            sublayer = build(self.placement(), self.site, SharedParts())
        for name, expected in sublayer.state_dict().items():
            shape, rule = tuple(self.tensors[name].shape), f"must be {tuple(expected.shape)}, as at {self.site.host}"
            check(f"shape of {self.sublayer} {name}", shape, shape == expected.shape, rule)


def fill(method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]) -> list[ConvertedSublayer]:
    """The sub-layers of a method. Takes their tensors from the checkpoint.

    Raises:
        ValueError: a setting is not supported, or a tensor is missing or has another shape.
    """
    readers = {None: bottlenecks, "lora": low_ranks, "prefix_tuning": prefixes}
    kind = method.get("architecture")
    sublayers = list(readers[kind](method, checkpoint, model, kept(method, sites)))
    check("architecture", kind, bool(sublayers), "selects nothing in this model")
    return sublayers


def kept(method: Settings, sites: list[Site]) -> list[Site]:
    """The sites in the layers of a method.

    Raises:
        ValueError: `leave_out` names every layer.
    """
    left_out = method.get("leave_out") or []
    sites = [site for site in sites if site.layer is not None and site.layer not in left_out]
    check("leave_out", left_out, bool(sites), "must leave at least one layer")
    return sites


def gate_pooling_of(method: Settings) -> GatePooling | None:
    """The pooling of the library's gates: a mean that includes padding."""
    return "mean_padded" if method.get("use_gating") else None


def activation_of(method: Settings) -> str:
    """The activation function, by its name in transformers.

    Raises:
        ValueError: transformers does not have it.
    """
    name = method["non_linearity"].lower().replace("leakyrelu", "leaky_relu")
    check("non_linearity", name, name in ACT2FN, "must be an activation of transformers")
    return name


def linear(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Tensor]:  # shapes: (d_out, d_in), (d_out,)
    """Take weight and bias of a linear layer."""
    return checkpoint.take(f"{name}.weight"), checkpoint.take(f"{name}.bias")


def linear_state(checkpoint: Checkpoint, name: str, part: str) -> dict[str, Tensor]:
    """Take a linear layer, by the names of its tensors in `part` of a sub-layer."""
    weight, bias = linear(checkpoint, name)
    return {f"{part}.weight": weight, f"{part}.bias": bias}


# Bottlenecks


def bottlenecks(
    method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]
) -> Iterator[ConvertedSublayer]:
    """The bottlenecks of a method."""
    names = bottleneck_sites(method, any(site.name == "parallel_residual" for site in sites))
    dropout, scaling = method.get("dropout", 0.0), method.get("scaling", 1.0)
    check("scaling", scaling, scaling != "channel", 'must be a number or "learned"')
    options = {"activation": activation_of(method), "dropout": dropout, "scaling": scaling}
    for site in (site for site in sites if site.name in names):
        name = bottleneck_name(model, site)
        tensors = linear_state(checkpoint, f"{name}.adapter_down.0", "down") | linear_state(
            checkpoint, f"{name}.adapter_up", "up"
        )
        if scaling == "learned":
            tensors["scaling"] = checkpoint.take(f"{name}.scaling").reshape(())
        if method.get("use_gating"):
            tensors |= linear_state(checkpoint, f"{name}.gate", "gate")
        r = len(tensors["down.bias"])
        yield ConvertedSublayer("bottleneck", site, gate_pooling_of(method), {"r": r, **options}, tensors)


def bottleneck_sites(method: Settings, pre_norm: bool) -> list[str]:
    """The names of the bottlenecks' sites.

    A parallel one reads the residual stream; in pre-norm models this is before the norm.

    Raises:
        ValueError: a combination of settings is not supported.
    """
    if method.get("is_parallel"):
        names = {"output_adapter": "parallel_residual" if pre_norm else "parallel_ffn"}
    elif method.get("original_ln_before"):
        residual = method.get("residual_before_ln", True)
        check("residual_before_ln", residual, residual is True, "must be True with `original_ln_before`")
        names = {"output_adapter": "after_residual"}
    else:
        names = {"mh_adapter": "after_attention", "cross_adapter": "cross_after_attention"}
        names |= {"output_adapter": "after_ffn"}
    for key in ("mh_adapter", "cross_adapter"):
        rule = "must be False with `is_parallel` or `original_ln_before`"
        check(key, method.get(key), not method.get(key) or key in names, rule)
    return [name for key, name in names.items() if method.get(key)]


def bottleneck_name(model: Any, site: Site) -> str:
    """The library's name for the bottleneck of a site."""
    assert site.layer is not None
    path, family = layer_paths(model)[site.layer], model.config.model_type
    role = {"after_attention": "attention", "cross_after_attention": "cross_attention"}.get(site.name, "output")
    if family == "t5":
        last = len(model.get_submodule(path).layer) - 1
        index = {"attention": 0, "cross_attention": 1, "output": last}[role]
        return f"{path}.layer.{index}.adapters"
    if family in ("bert", "roberta"):
        return f"{path}.{'attention.output' if role == 'attention' else 'output'}.adapters"
    return f"{path}.{role}_adapters.adapters"


# Low-rank branches


def low_rank_sites(method: Settings, model: Any, sites: list[Site]) -> list[tuple[str, list[Site]]]:
    """The leaves that LoRA or (IA)^3 changes, each with its sites; a fused leaf has several."""
    names = {ATTENTION_MATRICES.get(key) for key in method["attn_matrices"]} if method["selfattn_lora"] else set()
    ffn = ["ffn_input", "ffn_output"]
    if model.config.model_type == "llama":
        ffn.reverse()  # the library calls down_proj "intermediate" and up_proj "output"
    names |= {name for key, name in zip(("intermediate_lora", "output_lora"), ffn, strict=True) if method.get(key)}
    chosen = [site for site in sites if site.name.removeprefix("cross_") in names]
    return [(host, list(group)) for host, group in groupby(chosen, lambda site: site.host)]


def low_ranks(method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]) -> Iterator[ConvertedSublayer]:
    """The low-rank branches of a method. The tensors of a fused leaf are split into those of its branches."""
    gated = bool(method.get("use_gating"))
    options = {"r": method["r"], "alpha": method["r"] if gated else method["alpha"], "dropout": method["dropout"]}
    for host, group in low_rank_sites(method, model, sites):
        tensors = {"A": checkpoint.take(f"{host}.loras.lora_A"), "B": checkpoint.take(f"{host}.loras.lora_B")}
        if gated:
            tensors |= linear_state(checkpoint, f"{host}.loras.gate", "gate")
        parts = {name: tensor.tensor_split(len(group)) for name, tensor in tensors.items()}
        for index, site in enumerate(group):
            own = {name: chunks[index] for name, chunks in parts.items()}
            yield ConvertedSublayer("low_rank", site, gate_pooling_of(method), options, own)


# Prefixes


def prefixes(method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]) -> Iterator[ConvertedSublayer]:
    """The prefixes of a method."""
    t5 = model.config.model_type == "t5"
    if t5:
        left_out = method.get("leave_out")
        check("leave_out", left_out, not left_out, "must be empty for prefixes in T5, whose layers share a bias")
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        if site.name in ("attention", "cross_attention"):
            stacks.setdefault(prefix_name(model, site), []).append(site)
    for stack, stack_sites in stacks.items():
        if not method.get(stack, True):  # settings of these names switch prefixes off
            continue
        options = {
            "num_virtual_tokens": method["prefix_length"],
            "form": "joint",
            **({"shift_positions": True} if t5 else {}),
        }
        keys, values = prefix_vectors(method, checkpoint, stack, stack_sites)
        for site, p_k, p_v in zip(stack_sites, keys, values, strict=True):
            tensors = {"P_K": p_k, "P_V": p_v}
            if method.get("use_gating"):
                tensors |= linear_state(checkpoint, f"{site.host}.prefix_tuning.prefix_gates", "gate")
            yield ConvertedSublayer("prefix", site, gate_pooling_of(method), options, tensors)


def prefix_name(model: Any, site: Site) -> str:
    """The library's name for the prefixes in a stack of blocks."""
    if site.name == "cross_attention":
        return "cross_prefix"
    if model.config.model_type in ("t5", "bart") and not site.causal:
        return "encoder_prefix"
    return "self" if model.config.model_type == "distilbert" else "self_prefix"


def prefix_vectors(
    method: Settings, checkpoint: Checkpoint, stack: str, sites: list[Site]
) -> tuple[Tensor, Tensor]:  # shapes: (layers, heads, n_tokens, d_k), twice
    """The prefixes of a stack, computed by their reparameterisation network if there is one.

    Raises:
        ValueError: a tensor is missing or has another size.
    """
    name = f"prefix_tuning.prefix_tunings.{stack}"
    if method.get("flat"):
        p = checkpoint.take(f"{name}.control_trans")
    else:
        hidden = F.linear(checkpoint.take(f"{name}.wte.weight"), *linear(checkpoint, f"{name}.control_trans.0"))
        p = F.linear(ACT2FN[activation_of(method)](hidden), *linear(checkpoint, f"{name}.control_trans.2"))
    shape = (method["prefix_length"], len(sites), 2, sites[0].heads, sites[0].d_k)
    rule = f"must be {' x '.join(map(str, shape))}: tokens, layers, keys and values, heads, width of a head"
    check(f"size of {stack}", p.numel(), p.numel() == math.prod(shape), rule)
    keys, values = p.view(shape).permute(2, 1, 3, 0, 4)
    return keys, values
