"""From a model and a `LadderConfig` to the side networks, with every error found before anything changes."""

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..placement import check
from ..pruning import Importance, thin_config, thin_copy
from ..pruning.sizes import family_of
from ..structure import covers, own_modules, stacks
from .ladder_layer import Role
from .side_forward import check_forward
from .side_network import SideNetwork, backbones, cut_depth


@dataclass(frozen=True)
class Side:
    """A side network that has not been attached.

    Args:
        host: its backbone.
        role: the backbone's place in the model.
        network: the side network.
        kept: the blocks of the backbone that have a rung.
    """

    host: PreTrainedModel
    role: Role
    network: SideNetwork
    kept: list[int]


def side_networks(model: nn.Module, config: Any, importance: Importance | None = None) -> dict[str, Side]:
    """Path of the first block of a backbone -> its side network, for all backbones of a model.

    Args:
        model: the base model.
        config: the `LadderConfig`.
        importance: by which scores the backbone is pruned; None for the magnitude of its weights.

    Raises:
        ValueError: the architecture cannot be cut to a thin one, a layer does not exist or no layer of a backbone is
            kept, or a part of the backbone is to be trained and saved whole.
        TypeError: `model` is no transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers model, not {type(model).__name__}.")
    family_of(model.config)
    blocks = list(stacks(model))
    check_saved_whole(model, config)
    kept = kept_layers(config, [len(stack) for _, stack in blocks])
    body = cast(PreTrainedModel, model.base_model)
    thin, hosts = thin_body(model, config, importance), backbones(body)
    found: dict[str, Side] = {}
    roles: tuple[Role, ...] = ("alone",) if len(hosts) == 1 else ("encoder", "decoder")
    for (path, host), (stack, _), rungs, role in zip(hosts.items(), blocks, kept, roles, strict=True):
        check_forward(host)
        side: Any = cut_depth(cast(PreTrainedModel, thin.get_submodule(path)), rungs)
        if getattr(side, "pooler", None) is not None:
            side.pooler = None  # the backbone's own reads the output
        network = SideNetwork(side, host, config.temperature, ends=role != "encoder")
        found[f"{stack}.0"] = Side(host, role, network, rungs)
    return found


def kept_layers(config: Any, depths: list[int]) -> list[list[int]]:
    """The blocks that get a rung, for each backbone counted from 0.

    Raises:
        ValueError: a layer does not exist, or a backbone would have none.
    """
    total, chosen = sum(depths), config.layers_to_keep
    layers = list(range(total)) if chosen is None else sorted(set(chosen))
    rule = f"names layer {layers[-1]}, which does not exist; this model has layers 0 to {total - 1}"
    check("layers_to_keep", chosen, layers[-1] < total, rule)
    found, first = [], 0
    for depth in depths:
        found.append([layer - first for layer in layers if first <= layer < first + depth])
        rule = f"keeps none of the layers {first} to {first + depth - 1}, but each backbone needs a rung"
        check("layers_to_keep", chosen, bool(found[-1]), rule)
        first += depth
    return found


def check_saved_whole(model: nn.Module, config: Any) -> None:
    """Refuse to train modules of the backbone, which no gradient reaches; BERT's pooler comes behind it."""
    inside = tuple(backbones(model))
    named = tuple(config.modules_to_save or ())
    for path, _ in own_modules(model):
        frozen = bool(path) and covers(inside, path) and not path.endswith("pooler")
        rule = f"names {path}, a part of the backbone, which no gradient reaches under a ladder"
        check("modules_to_save", config.modules_to_save, not (frozen and path.endswith(named)), rule)


def thin_body(model: PreTrainedModel, config: Any, importance: Importance | None) -> PreTrainedModel:
    """The model without its head, pruned to the side network's width."""
    body = cast(PreTrainedModel, model.base_model)
    if nn.Linear(1, 1).weight.is_meta:  # `low_cpu_mem_usage`: the weights will be loaded
        return type(body)(thin_config(body.config, config.r, config.reading))
    if importance is not None:  # of the model with its head, where paths are longer
        above = "" if body is model else f"{model.base_model_prefix}."
        rows, columns = (
            {path.removeprefix(above): scores for path, scores in table.items() if path.startswith(above)}
            for table in (importance.rows, importance.columns)
        )
        importance = replace(importance, rows=rows, columns=columns)
    return thin_copy(body, config.r, config.reading, importance).model
