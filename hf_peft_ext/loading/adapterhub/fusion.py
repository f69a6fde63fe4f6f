"""Imports an AdapterFusion that AdapterHub's library has saved, into a model that has its adapters."""

import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_peft_ext.attach.layer import TunerLayer
from hf_peft_ext.loading.adapterhub.heads import import_head
from hf_peft_ext.model.structure import layer_paths
from hf_peft_ext.tuners import AttentionFusionConfig
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.config_schema import read_json

CONFIG, WEIGHTS, SAFE_WEIGHTS = (
    "adapter_fusion_config.json",
    "pytorch_model_adapter_fusion.bin",
    "model_adapter_fusion.safetensors",
)
FUSION_SETTINGS = {
    "key": True,
    "query": True,
    "query_before_ln": False,
    "residual_before": False,
    "temperature": False,
}
TENSORS = {"query.weight": "W_Q", "query.bias": "b_Q", "key.weight": "W_K", "key.bias": "b_K", "value.weight": "W_V"}
IN_FRONT = ("after_attention", "cross_after_attention")  # of a layer, in front of all others


def is_fusion(path: str | Path) -> bool:
    """Whether a folder holds a fusion that AdapterHub's library has saved (`save_adapter_fusion`)."""
    return (Path(path) / CONFIG).is_file()


def fusion_from_adapterhub(
    path: str | Path,
    model: nn.Module,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    with_head: bool = True,
) -> PeftModel:
    """Import a fusion as an `AttentionFusionConfig` of style "pfeiffer", and activate it. The outputs are equal.

    Args:
        path: the folder.
        model: a model that has the fused adapters, by the names that they had in the library.
        adapter_name: name of the fusion in the model.
        is_trainable: whether it can be trained further.
        with_head: whether to import the prediction head beside it. The adapters must have none then.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a `PeftModel`.
        ValueError: a setting is not supported, or the model lacks an adapter or a place of the fusion.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"`model` (={type(model).__name__}) must be a PeftModel that has the adapters of the fusion.")
    saved = read_json(Path(path) / CONFIG)
    settings, fusion_name = saved.get("config"), saved.get("name")
    is_saved = isinstance(settings, dict) and isinstance(fusion_name, str)
    check("path", str(path), is_saved, f"must hold the `name` and the `config` of a fusion in {CONFIG}")
    settings, fusion_name = cast(dict[str, Any], settings), cast(str, fusion_name)
    names = saved.get("adapter_names") or fusion_name
    for key, required in FUSION_SETTINGS.items():
        value = settings.get(key, required)
        check(key, value, value is required, f"must be {required}")
    names = names.split(",") if isinstance(names, str) else names
    states = states_by_layer(read_weights(Path(path)), fusion_name)
    config = AttentionFusionConfig(adapters=names, style="pfeiffer", value=bool(settings.get("value", True)))
    config.inference_mode = not is_trainable
    base: Any = model.get_base_model()
    head = import_head(Path(path), base, [], with_head)
    config.modules_to_save = head.modules or None
    model.add_adapter(adapter_name, config)
    try:
        copy_states(model, adapter_name, states)
        set_peft_model_state_dict(model, head.state, adapter_name)
    except BaseException:
        model.delete_adapter(adapter_name)
        raise
    model.set_adapter(adapter_name, inference_mode=not is_trainable)
    head.set_config(base.config)
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a fusion. A pickle is read with `weights_only`, so that it runs no code."""
    if (path / SAFE_WEIGHTS).is_file():
        return load_file(path / SAFE_WEIGHTS)
    check("path", str(path), (path / WEIGHTS).is_file(), f"must hold {SAFE_WEIGHTS} or {WEIGHTS}")
    return torch.load(path / WEIGHTS, map_location="cpu", weights_only=True)


def states_by_layer(tensors: dict[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each place, by our names; the places in the order of a forward pass inside their layer.

    Raises:
        ValueError: a tensor is no part of the fusion.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place, _, part = key.partition(f".adapter_fusion_layer.{name}.")
        check("path", key, part in TENSORS, "must be a tensor of the fusion")
        states.setdefault(place, {})[TENSORS[part]] = tensor
    return dict(sorted(states.items(), key=lambda item: (kind(item[0]), item[0])))


def kind(place: str) -> int:
    """0 after attention, 1 after cross-attention, 2 after the FFN; 2 in T5 too, which numbers the parts of a layer."""
    part = place.rpartition("layer")[2]
    return 1 if "cross" in part else 0 if "attention" in part else 2


@torch.no_grad()
def copy_states(model: PeftModel, adapter_name: str, states: dict[str, dict[str, Tensor]]) -> None:
    """Copy the tensors of a fusion into its sub-layers.

    Raises:
        ValueError: the places or the shapes differ, or the library computes something else there.
    """
    base: Any = model.get_base_model()
    layers = [m for m in model.modules() if isinstance(m, TunerLayer) and adapter_name in m.sublayer_of]
    for index, path in enumerate(layer_paths(base)):
        path = re.escape(path.removeprefix(f"{base.base_model_prefix}."))
        theirs = [state for place, state in states.items() if re.search(rf"(^|\.){path}\.", place)]
        own = sorted((layer for layer in layers if layer.site.layer == index), key=order)
        rule = f"must be {len(own)}, as the adapters have"
        check(f"places in layer {index}", len(theirs), len(theirs) == len(own), rule)
        for layer, state in zip(own, theirs, strict=True):
            check_equal_formula(layer, adapter_name)
            fusion = layer.sublayer_of[adapter_name]
            shapes = {name: tuple(tensor.shape) for name, tensor in fusion.state_dict().items()}
            saved = {name: tuple(tensor.shape) for name, tensor in state.items()}
            check("shapes", saved, saved == shapes, f"must be {shapes}, as at {layer.site.host}")
            fusion.load_state_dict(state)
    rule = f"must be {len(layers)}, as the adapters have"
    check("places", len(states), len(states) == len(layers), rule)


def order(layer: TunerLayer) -> int:
    """0 after attention, 1 after cross-attention, 2 after the FFN."""
    return (*IN_FRONT, layer.site.name).index(layer.site.name)


def check_equal_formula(layer: TunerLayer, adapter_name: str) -> None:
    """Refuse adapters that the library fuses by another formula.

    Raises:
        ValueError: they are parallel, or have gates.
    """
    rule = "must not be parallel: the library adds x twice in a fusion"
    check("adapters", layer.site.host, not layer.site.name.startswith("parallel_"), rule)
    gated = any(layer.sublayer_of[name].gate for name in layer.sublayer_of[adapter_name].names)
    check("adapters", layer.site.host, not gated, "must have no gates: the library drops them in a fusion")
