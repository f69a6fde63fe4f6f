"""From filled sites to a config of peft and its state, and into the model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.layer import child_name, holder_of
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint, is_ia3
from hf_peft_ext.loading.adapterhub.converted import Filled, fill
from hf_peft_ext.loading.adapterhub.stock import endings, stock_ia3, stock_lora
from hf_peft_ext.model.sites import Site, find_sites
from hf_peft_ext.tuners import BottleneckConfig, ComposedConfig, LayerPrefixConfig, MAMConfig, UniPELTConfig
from hf_peft_ext.tuners.bottleneck import STYLES
from hf_peft_ext.validation.checks import check

# sub-layer -> the options that change nothing
DEFAULTS: dict[str, dict[str, Any]] = {
    "bottleneck": {"activation": "relu", "dropout": 0.0, "scaling": 1.0},
    "low_rank": {"dropout": 0.0},
    "prefix": {"shift_positions": False},
}


def from_adapterhub(
    path: str | Path, model: nn.Module, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Import an adapter that AdapterHub's library has saved (`model.save_adapter`), with equal outputs.

    It takes bottlenecks (seq_bn, double_seq_bn, par_bn, scaled_par_bn), prefix_tuning and its flat form, lora, ia3,
    and unions of them such as mam and unipelt, for BERT, RoBERTa, DistilBERT, GPT-2, Llama, T5 and BART. An ungated
    lora and ia3 become peft's own `LORA` and `IA3`, all others a type of this package. Prefixes come without the
    network that they were trained through, and gates count padding, as in that library. A prediction head, which the
    library saves in files of its own, stays out.

    AdapterHub: Pfeiffer et al. 2020 (https://arxiv.org/abs/2007.07779); `adapters`: Poth et al. 2023
    (https://arxiv.org/abs/2311.11077), as version 1.3.0 writes and runs it.

    Args:
        path: the folder with `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`.
        model: the base model, a plain model of transformers.
        adapter_name: name of the adapter in the result.
        is_trainable: whether the adapter is to be trained further; else it is frozen and in evaluation mode.

    Returns:
        The model with the adapter, to be saved and loaded as any other of peft.

    Raises:
        ValueError: the folder holds no such checkpoint, or one for another model; a setting has no counterpart here;
            or the tensors are not those that the config and the model ask for. The model is then as it was.
    """
    check("model", type(model).__name__, not isinstance(model, PeftModel), "must be a model without adapters")
    config, state = convert(Checkpoint(Path(path), model), model)
    config.inference_mode = not is_trainable
    peft_model = get_peft_model(model, config, adapter_name)  # type: ignore[arg-type]
    set_peft_model_state_dict(peft_model, state, adapter_name)
    return peft_model if is_trainable else peft_model.eval()


def convert(checkpoint: Checkpoint, model: nn.Module) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config of an adapter, and its state as peft saves it. The model is only looked at."""
    sites, methods = find_sites(model), checkpoint.methods
    if is_ia3(methods[0]):
        config, state = stock_ia3(methods[0], checkpoint, model, sites)
    else:
        filled = [one for method in methods for one in fill(method, checkpoint, model, sites)]
        if len(methods) == 1 and filled[0].sublayer == "low_rank" and filled[0].gate is None:
            config, state = stock_lora(filled, model)
        else:
            config, state = config_of(filled, model, sites), state_of(filled)
    checkpoint.check_all_taken()
    return config, {f"base_model.model.{name}": tensor.clone() for name, tensor in state.items()}


def state_of(filled: list[Filled]) -> dict[str, Tensor]:
    return {
        f"{holder_of(one.site)}.{child_name(one.site.name, one.sublayer)}.sublayer_of.{name}": tensor
        for one in filled
        for name, tensor in one.tensors.items()
    }


def config_of(filled: list[Filled], model: nn.Module, sites: list[Site]) -> PlacedConfig:
    """The named method with these placements, or else a `ComposedConfig`."""
    placements, excluded = placements_of(filled, sites)
    common: dict[str, Any] = {"exclude_modules": endings(excluded, model) if excluded else None}
    if all(placement.layers == placements[0].layers for placement in placements):
        common["layers_to_transform"] = placements[0].layers
        placements = [replace(placement, layers=None) for placement in placements]
    wanted = [meaning(placement) for placement in placements]
    for config in candidates(placements, common):
        found = [meaning(placement) for placement in config.to_placements()]
        if len(found) == len(wanted) and all(placement in wanted for placement in found):
            return config
    return ComposedConfig(placements=placements, **common)


def placements_of(filled: list[Filled], sites: list[Site]) -> tuple[list[Placement], list[str]]:
    """The placements that fill these sites, and the modules where they would put a sub-layer too many."""
    groups: list[tuple[Placement, list[Site]]] = []
    for one in filled:
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
    """Named methods with the sub-layers of these placements, perhaps elsewhere."""
    options = {placement.sublayer: placement.options for placement in placements}
    bottleneck, prefix, lora = (options.get(name, {}) for name in ("bottleneck", "prefix", "low_rank"))
    n_tokens = prefix.get("num_virtual_tokens", 0)
    if options.keys() == {"bottleneck"}:
        for style in STYLES:
            if style != "parallel" or bottleneck["scaling"] == 1.0:
                yield BottleneckConfig(style=style, **bottleneck, **common)  # type: ignore[arg-type]
    elif options.keys() == {"prefix"}:
        yield LayerPrefixConfig(num_virtual_tokens=n_tokens, **common)
    elif options.keys() == {"prefix", "bottleneck"}:
        r, scaling, dropout = (bottleneck[key] for key in ("r", "scaling", "dropout"))
        yield MAMConfig(num_virtual_tokens=n_tokens, bottleneck_size=r, scaling=scaling, dropout=dropout, **common)
    elif options.keys() == {"prefix", "bottleneck", "low_rank"}:
        yield UniPELTConfig(
            **{"num_virtual_tokens": n_tokens, "bottleneck_size": bottleneck["r"]},
            **{"r": lora["r"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"]},
            lora_targets=[placement.site for placement in placements if placement.sublayer == "low_rank"],
            gated=any(placement.gate for placement in placements),
            gate_pooling="mean_padded",
            **common,
        )


def meaning(placement: Placement) -> tuple[Any, ...]:
    """What a placement does once its weights are loaded."""
    options = {key: value for key, value in placement.options.items() if value is not None and key != "init"}
    return placement.sublayer, placement.site, placement.layers, placement.gate, DEFAULTS[placement.sublayer] | options
