"""The parameters of a model whose entries may be selected, as one space of indices."""

import math
import re
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hf_peft_ext.attach.resolve import check_layers
from hf_peft_ext.model.calls import own_children, own_modules
from hf_peft_ext.model.structure import innermost, is_bypassed, layer_of, layer_paths, leaf_size
from hf_peft_ext.tuners.sparse.config import SparseConfig
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.module_patterns import matching

# task type -> modules that peft saves whole, but names in the config only after the adapter is attached
HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


class SparseTarget(NamedTuple):
    """A parameter whose entries may be selected.

    Args:
        start: index of its first entry in the space of all targets.
        shape: its shape; that of the weight before quantization, if it is quantized.
        uses: (module, name in it) of each module that has it; several for tied weights.
    """

    start: int
    shape: torch.Size
    uses: tuple[tuple[str, str], ...]

    @property
    def stop(self) -> int:
        """The index after its last entry."""
        return self.start + math.prod(self.shape)


def find_targets(model: nn.Module, config: SparseConfig) -> list[SparseTarget]:
    """The targets of a config in the order of the model's modules. Tied weights are one target.

    Raises:
        ValueError: a layer does not exist, or there is no target.
    """
    shapes: dict[int, torch.Size] = {}  # id of a parameter, or of a module whose weight is packed otherwise
    uses: dict[int, list[tuple[str, str]]] = {}
    for path in target_paths(model, config):
        module = innermost(model.get_submodule(path))
        for name, (owner, shape) in parameter_shapes(module).items():
            shapes.setdefault(id(owner), shape)
            uses.setdefault(id(owner), []).append((path, name))
    targets, start = list[SparseTarget](), 0
    for owner, shape in shapes.items():
        targets.append(SparseTarget(start, shape, tuple(uses[owner])))
        start = targets[-1].stop
    pattern = config.target_modules
    check("target_modules", pattern, bool(targets), "and the other fields leave no parameter to select")
    return targets


def host_path(model: nn.Module, config: SparseConfig) -> str:
    """The module that holds the tuner layer: the first with parameters of its own, so that all adapters share it."""
    return next(path for path in leaf_paths(model, config) if parameter_shapes(innermost(model.get_submodule(path))))


def leaf_paths(model: nn.Module, config: SparseConfig) -> list[str]:
    """Paths of the modules that compute with their own parameters only, without those that are saved whole."""
    whole = [*(config.modules_to_save or []), *HEADS.get(str(config.task_type), [])]
    roots = [re.compile(rf"(.*\.)?{re.escape(name)}(\..*)?") for name in whole]
    paths = [path for path, module in own_modules(model) if path and is_leaf(module) and not is_bypassed(model, path)]
    return [path for path in paths if not any(root.fullmatch(path) for root in roots)]


def target_paths(model: nn.Module, config: SparseConfig) -> list[str]:
    """Paths of the modules whose parameters may be selected."""
    layers, chosen = layer_paths(model), cast(list[int] | None, config.layers_to_transform)
    check_layers("layers_to_transform", chosen, len(layers))
    paths = leaf_paths(model, config)
    excluded = set(matching(config.exclude_modules or [], paths))
    named = set(paths if config.target_modules is None else matching(config.target_modules, paths))
    return [
        path for path in paths if path in named - excluded and (chosen is None or layer_of(path, layers) in chosen)
    ]


def is_leaf(module: nn.Module) -> bool:
    """Whether a module computes with its own parameters only."""
    return leaf_size(module) is not None or not own_children(innermost(module))


def parameter_shapes(module: nn.Module) -> dict[str, tuple[object, torch.Size]]:
    """Name -> the parameter and its shape. A packed weight has the shape (d_out, d_in), and may be no parameter."""
    own: dict[str, tuple[object, torch.Size]] = {
        name: (p, p.shape) for name, p in module.named_parameters(recurse=False) if p.is_floating_point()
    }
    size = leaf_size(module)
    if size is not None and is_packed(module):
        own["weight"] = (getattr(module, "weight", module), torch.Size((size[1], size[0])))
    return own


def is_packed(module: nn.Module) -> bool:
    """Whether the weight of a linear leaf is quantized."""
    weight, size = getattr(module, "weight", None), leaf_size(module)
    if size is None:
        return False
    return not (isinstance(weight, Tensor) and weight.is_floating_point() and sorted(weight.shape) == sorted(size))
