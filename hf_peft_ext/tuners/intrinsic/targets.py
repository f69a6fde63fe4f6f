"""The parameters that an adapter projects onto."""

import re
from typing import Any, NamedTuple

import torch
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from hf_peft_ext.attach.resolve import check_layers
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.structure import layer_of, layer_paths, leaf_size
from hf_peft_ext.tuners.intrinsic.config import IntrinsicConfig
from hf_peft_ext.tuners.intrinsic.layer import intrinsic_layer
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.module_patterns import matching

PACKED = (torch.uint8, torch.int8)  # types of quantized weights


class Target(NamedTuple):
    """A parameter of a module.

    Args:
        path: path of the module.
        name: name of the parameter in it.
        parameter: the parameter.
        tied_to: path and name of the first place of the same parameter; None if this is the first.
    """

    path: str
    name: str
    parameter: Tensor
    tied_to: str | None

    @property
    def key(self) -> str:
        """Path and name of the first place of the parameter, which identify it."""
        return self.tied_to or f"{self.path}.{self.name}".lstrip(".")


def target_parameters(model: nn.Module, config: IntrinsicConfig) -> list[Target]:
    """The parameters of a model that a config adapts, each place of a tied one included.

    Raises:
        ValueError: the model is quantized, a pattern matches no module, a layer does not exist, or no parameter is
            left.
    """
    modules = {path: m for path, m in own_modules(model) if "parametrizations" not in path.split(".")}
    chosen = chosen_paths(model, config, modules)
    wanted = {id(p) for path in chosen for p in own_parameters(modules[path]).values()}
    first: dict[int, str] = {}
    targets = []
    for path, module in modules.items():
        for name, parameter in own_parameters(module).items():
            if id(parameter) in wanted:
                tied_to = first.get(id(parameter))
                first.setdefault(id(parameter), f"{path}.{name}".lstrip("."))
                check_module(path, module)
                targets.append(Target(path, name, parameter, tied_to))
    check("exclude_modules", config.exclude_modules, bool(targets), "leaves no parameter to adapt")
    return targets


def chosen_paths(model: nn.Module, config: IntrinsicConfig, modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the modules whose own parameters a config adapts."""
    layers: Any = config.layers_to_transform
    blocks = layer_paths(model)
    check_layers("layers_to_transform", layers, len(blocks))
    if config.target_modules is None:
        chosen = [path for path in modules if path != untied_head(model)]
    elif config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        chosen = [path for path in modules if path != untied_head(model) and leaf_size(modules[path])]
    else:
        chosen = matching(config.target_modules, modules)
        check("target_modules", config.target_modules, bool(chosen), f"matches no module of {type(model).__name__}")
    roots = [rf"(^|.*\.){re.escape(name)}($|\..*)" for name in config.modules_to_save or []]
    left_out = set(matching(config.exclude_modules or [], modules))
    return [
        path
        for path in chosen
        if path not in left_out
        and not any(re.match(root, path) for root in roots)
        and (layers is None or layer_of(path, blocks) in layers)
    ]


def own_parameters(module: Any) -> dict[str, Tensor]:
    """The floating-point parameters of a module itself, without those that other parametrizations compute.

    Raises:
        ValueError: they are quantized.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None}
    for name in getattr(module, "parametrizations", ()):
        if intrinsic_layer(module, name) is not None:
            own[name] = module.parametrizations[name].original
    if any(p.dtype in PACKED for p in own.values()) or hasattr(module, "qweight"):
        raise ValueError(
            f"{type(module).__name__} is quantized, but IntrinsicConfig adds to the weights themselves; load the "
            "model in 16 or 32 bits."
        )
    return {name: p for name, p in own.items() if p.is_floating_point()}


def check_module(path: str, module: nn.Module) -> None:
    """Refuse recurrent modules of torch, which keep their weights in a list of their own.

    Raises:
        ValueError: the module is one.
    """
    kind, rule = type(module).__name__, "reads its weights past any parametrization; name it in `exclude_modules`"
    check("target_modules", path, not isinstance(module, nn.RNNBase), f"is of type {kind}, which {rule}")


def untied_head(model: Any) -> str | None:
    """Path of the output head of a language model, unless its weight is also the weight of another module."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None
    weights = [id(p) for module in model.modules() for p in own_parameters(module).values()]
    tied = any(weights.count(id(p)) > 1 for p in own_parameters(head).values())
    return None if tied else next(path for path, module in model.named_modules() if module is head)


def scale_group(target: Target, per_tensor: bool) -> str:
    """The name of the scale of a parameter: its own, or that of its numbered layer, or of its module."""
    if per_tensor:
        return target.key
    parts = target.key.split(".")[:-1]
    numbered = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: numbered + 1])
