"""Imports an AdapterHub adapter: converts it to a config and a state of peft, and attaches it to the model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.layer import child_name, holder_of
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.loading.adapterhub.bottlenecks import bottlenecks, shared_rule
from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.converted import ConvertedSublayer
from hf_peft_ext.loading.adapterhub.couplings import coupling
from hf_peft_ext.loading.adapterhub.fusion import fusion_from_adapterhub, is_fusion
from hf_peft_ext.loading.adapterhub.heads import import_head
from hf_peft_ext.loading.adapterhub.interventions import interventions
from hf_peft_ext.loading.adapterhub.low_ranks import check_fused_rows, low_ranks
from hf_peft_ext.loading.adapterhub.names import kept
from hf_peft_ext.loading.adapterhub.prefixes import prefixes
from hf_peft_ext.loading.adapterhub.settings import Settings, is_ia3
from hf_peft_ext.loading.adapterhub.soft_prompts import soft_prompts
from hf_peft_ext.loading.adapterhub.stock import add_dora, module_suffixes, stock_ia3, stock_lora
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.tuners import (
    BottleneckConfig,
    CompacterConfig,
    ComposedConfig,
    LayerPrefixConfig,
    MAMConfig,
    UniPELTConfig,
)
from hf_peft_ext.tuners.bottleneck import STYLES
from hf_peft_ext.tuners.compacter import COMPACTER_SITES
from hf_peft_ext.validation.checks import check

READERS = {
    None: bottlenecks,
    "lora": low_ranks,
    "prefix_tuning": prefixes,
    "prompt_tuning": soft_prompts,
    "reft": interventions,
}
# sub-layer -> the default values of its options
DEFAULTS: dict[str, dict[str, Any]] = {
    "bottleneck": {"activation": "relu", "dropout": 0.0, "scaling": 1.0},
    "low_rank": {"dropout": 0.0},
    "prefix": {"shift_positions": False},
    "coupling": {},
    "prompt": {},
    "intervention": {},
}


def from_adapterhub(
    path: str | Path,
    model: nn.Module,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    with_head: bool = True,
) -> PeftModel:
    """Import an adapter saved by AdapterHub's library (`model.save_adapter`), with equal outputs.

    A fusion (`save_adapter_fusion`) is imported into a `PeftModel` with its adapters: `fusion_from_adapterhub`.

    It supports bottlenecks (also with norms of their own, Compacter's matrices and AdapterPlus), invertible adapters
    (NICE), prefix_tuning and its flat form, prompt_tuning, LoReFT and NoReFT, lora, DoRA, VeRA, ia3, and unions of
    them such as mam and unipelt, for all models of that library but X-MOD. An ungated lora, DoRA and VeRA become
    `LORA` of peft, ia3 becomes `IA3`; all others become a type of this package. Prefixes are imported without their
    reparameterisation network. Gates include padding, as in that library.

    A prediction head beside the adapter becomes its `modules_to_save`, and its labels those of the model's config. The
    model must have an equal head: else the adapter comes without it, and a warning says why. Dropout in the head is
    the model's.

    AdapterHub: Pfeiffer et al. 2020 (https://arxiv.org/abs/2007.07779); `adapters`: Poth et al. 2023
    (https://arxiv.org/abs/2311.11077), version 1.3.0.

    Args:
        path: the folder with `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`.
        model: the base model, from transformers, without adapters.
        adapter_name: name of the adapter in the result.
        is_trainable: whether the adapter can be trained further; else it is frozen and in evaluation mode.
        with_head: whether to import the prediction head beside the adapter.

    Returns:
        The model with the adapter; peft can save and load it.

    Raises:
        ValueError: the folder holds no such checkpoint, it is for another model, a setting is not supported, or the
            tensors do not fit config and model, or the model's head has another number of labels. The model does not
            change then.
    """
    if is_fusion(path):
        return fusion_from_adapterhub(path, model, adapter_name, is_trainable=is_trainable, with_head=with_head)
    check("model", type(model).__name__, not isinstance(model, PeftModel), "must be a model without adapters")
    checkpoint = Checkpoint(Path(path), model)
    config, state = convert(checkpoint, model)
    head = import_head(Path(path), model, checkpoint.methods, with_head)
    config.inference_mode = not is_trainable
    if head.modules:
        config.modules_to_save, config.task_type = head.modules, head.task_type  # type: ignore[attr-defined]
    peft_model = get_peft_model(model, config, adapter_name)  # type: ignore[arg-type]
    set_peft_model_state_dict(peft_model, state | head.state, adapter_name)
    head.set_config(model.config)
    return peft_model if is_trainable else peft_model.eval()


def convert(checkpoint: Checkpoint, model: nn.Module) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config of an adapter, and its state as peft saves it. The model does not change.

    Raises:
        ValueError: see `from_adapterhub`.
    """
    sites, methods = find_sites(model), checkpoint.methods
    if is_ia3(methods[0]):
        config, state = stock_ia3(methods[0], checkpoint, model, sites)
    else:
        converted = [sublayer for method in methods for sublayer in fill(method, checkpoint, model, sites)]
        if len(methods) == 1 and converted[0].sublayer == "low_rank" and converted[0].gate is None:
            config, state = stock_lora(converted, model)
            if methods[0].get("use_dora"):
                add_dora(config, state, checkpoint, model)
        else:
            dora = any(method.get("use_dora") for method in methods)
            check("use_dora", dora, not dora, "must be False in a union or with a gate")
            check_fused_rows(converted, sites, model)
            config, state = config_of(converted, model, sites), state_of(converted) | shared_rule(methods, checkpoint)
    checkpoint.check_all_taken()
    return config, {f"base_model.model.{name}": tensor.clone() for name, tensor in state.items()}


def fill(method: Settings, checkpoint: Checkpoint, model: nn.Module, sites: list[Site]) -> list[ConvertedSublayer]:
    """The sub-layers of a method. Takes their tensors from the checkpoint.

    Raises:
        ValueError: a setting is not supported, or a tensor is missing or has another shape.
    """
    kind = method.get("architecture")
    sublayers = list(READERS[kind](method, checkpoint, model, kept(method, model, sites)))
    if method.get("inv_adapter"):
        sublayers.append(coupling(method, checkpoint, model, sites))
    check("architecture", kind, bool(sublayers), "selects nothing in this model")
    return sublayers


def state_of(converted: list[ConvertedSublayer]) -> dict[str, Tensor]:
    """The tensors by their names in the model with the adapter."""
    return {
        f"{holder_of(one.site)}.{child_name(one.site.name, one.sublayer)}.sublayer_of.{name}": tensor
        for one in converted
        for name, tensor in one.tensors.items()
    }


def config_of(converted: list[ConvertedSublayer], model: nn.Module, sites: list[Site]) -> PlacedConfig:
    """The config of the named method with these placements, or else a `ComposedConfig`."""
    placements, excluded = placements_of(converted, sites)
    common: dict[str, Any] = {"exclude_modules": module_suffixes(excluded, model) if excluded else None}
    embeddings = sorted({one.site.host for one in converted if one.site.name == "embeddings"})
    if embeddings:
        common["sites"] = {"embeddings": module_suffixes(embeddings, model)}
    if all(placement.layers == placements[0].layers for placement in placements):
        common["layers_to_transform"] = placements[0].layers
        placements = [replace(placement, layers=None) for placement in placements]
    effects = [effect(placement) for placement in placements]
    for config in candidates(placements, common):
        own = [effect(placement) for placement in config.to_placements()]
        if len(own) == len(effects) and all(placement in effects for placement in own):
            return config
    return ComposedConfig(placements=placements, **common)


def placements_of(converted: list[ConvertedSublayer], sites: list[Site]) -> tuple[list[Placement], list[str]]:
    """The placements of these sub-layers, and the modules that must be excluded from them."""
    groups: list[tuple[Placement, list[Site]]] = []
    for one in converted:
        placement = one.placement()
        group = next((group for same, group in groups if same == placement), None)
        if group is None:
            groups.append((placement, group := []))
        group.append(one.site)
    placements, excluded = [], []
    for placement, group in groups:
        served = [site for site in sites if site.serves(placement.site)]
        layers = sorted({site.layer for site in group if site.layer is not None})
        everywhere = layers == sorted({site.layer for site in served if site.layer is not None})
        placements.append(replace(placement, layers=None if everywhere else layers))
        hosts = {site.host for site in group}
        excluded += [site.host for site in served if site.layer in layers and site.host not in hosts]
    return placements, excluded


def candidates(placements: list[Placement], common: dict[str, Any]) -> Iterator[PlacedConfig]:
    """Configs of named methods with these sub-layers, perhaps at other sites."""
    options = {placement.sublayer: placement.options for placement in placements}
    bottleneck, prefix, lora = (options.get(name, {}) for name in ("bottleneck", "prefix", "low_rank"))
    n_tokens = prefix.get("num_virtual_tokens", 0)
    if options.keys() & {"coupling", "prompt", "intervention"}:
        return
    if options.keys() == {"bottleneck"} and "phm_dim" in bottleneck:
        own = {key: value for key, value in bottleneck.items() if key != "scaling"}
        for style in COMPACTER_SITES:
            yield CompacterConfig(style=style, init="paper", **own, **common)  # type: ignore[arg-type]
    elif options.keys() == {"bottleneck"} and "norm" not in bottleneck:
        for style in STYLES:
            if style != "parallel" or bottleneck["scaling"] == 1.0:
                yield BottleneckConfig(style=style, init="paper", **bottleneck, **common)  # type: ignore[arg-type]
    elif options.keys() == {"prefix"}:
        yield LayerPrefixConfig(init="paper", num_virtual_tokens=n_tokens, **common)
    elif bottleneck.keys() & {"phm_dim", "norm"}:
        return
    elif options.keys() == {"prefix", "bottleneck"}:
        r, scaling, dropout = (bottleneck[key] for key in ("r", "scaling", "dropout"))
        sizes = {"num_virtual_tokens": n_tokens, "bottleneck_size": r}
        yield MAMConfig(init="paper", scaling=scaling, dropout=dropout, **sizes, **common)
    elif options.keys() == {"prefix", "bottleneck", "low_rank"}:
        yield UniPELTConfig(
            init="paper",
            **{"num_virtual_tokens": n_tokens, "bottleneck_size": bottleneck["r"]},
            **{"r": lora["r"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"]},
            lora_targets=[placement.site for placement in placements if placement.sublayer == "low_rank"],
            gated=any(placement.gate for placement in placements),
            gate_pooling="mean_padded",
            **common,
        )


def effect(placement: Placement) -> tuple[Any, ...]:
    """A placement without the options that have no effect after its weights are loaded."""
    options = {key: value for key, value in placement.options.items() if value is not None and key != "init"}
    return placement.sublayer, placement.site, placement.layers, placement.gate, DEFAULTS[placement.sublayer] | options
