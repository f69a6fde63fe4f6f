"""From a model and a `LadderConfig` to the side networks, with every error raised before anything changes.

The families are not listed. A model can have a ladder if its structure shows

- one stack of blocks in a backbone that embeds tokens, or two such backbones, an encoder and its decoder;
- which axes the weights of its blocks have (`pruning.channels`), because a side network starts as the backbone's own
  weights, cut to its width.

Refused are backbones that embed no tokens (images, sound), that run a block several times (ALBERT), and those that
pruning refuses: experts, latent keys, mixers without softmax.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.sites import input_embeddings
from hf_peft_ext.model.structure import covers, stacks
from hf_peft_ext.pruning import Importance, pruned_config, pruned_copy
from hf_peft_ext.pruning.sizes import refuse_pruning
from hf_peft_ext.tuners.ladder.forward import check_forward
from hf_peft_ext.tuners.ladder.layer import Role
from hf_peft_ext.tuners.ladder.network import SideNetwork, backbones, cut_depth
from hf_peft_ext.validation.checks import check


@dataclass(frozen=True)
class Side:
    """A side network that has not been attached.

    Args:
        host: its backbone.
        role: the backbone's place in the model.
        network: the side network.
        kept: the blocks of the backbone that have a side block.
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
        importance: the scores by which the backbone is pruned; None for the magnitude of its weights.

    Raises:
        ValueError: the architecture cannot be pruned, a layer does not exist or no layer of a backbone is kept, or a
            part of the backbone is to be trained and saved whole.
        TypeError: `model` is no transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers model, not {type(model).__name__}.")
    blocks, hosts = list(stacks(model)), backbones(model)
    roles = backbone_roles(model, hosts)
    check_saved_whole(model, config)
    kept = kept_layers(config, [len(stack) for _, stack in blocks])
    body = cast(PreTrainedModel, model.base_model)
    pruned = pruned_body(model, config, importance)
    sides: dict[str, Side] = {}
    for (path, host), (stack, _), layers, role in zip(backbones(body).items(), blocks, kept, roles, strict=True):
        check_forward(host)
        side: Any = cut_depth(cast(PreTrainedModel, pruned.get_submodule(path)), layers)
        if getattr(side, "pooler", None) is not None:
            side.pooler = nn.Identity()  # the backbone's own reads the output
        network = SideNetwork(side, host, config.temperature, ends=role != "encoder")
        sides[f"{stack}.0"] = Side(host, role, network, layers)
    return sides


def backbone_roles(model: PreTrainedModel, hosts: Mapping[str, PreTrainedModel]) -> tuple[Role, ...]:
    """The role of each backbone of a model.

    Raises:
        ValueError: these backbones cannot have a ladder.
    """
    blocks = list(stacks(model))
    if not blocks:
        refuse_pruning(model, "no supported transformer blocks were found")
    if len(hosts) != len(blocks) or len(hosts) > 1 + bool(model.config.is_encoder_decoder):
        counts = f"{len(blocks)} stacks of blocks in {len(hosts)} backbones"
        refuse_pruning(model, f"it has {counts}, expected one or an encoder and its decoder")
    for host in hosts.values():
        embedding = input_embeddings(host)
        if not isinstance(embedding, (nn.Embedding, AuxiliaryTrainingWrapper)):  # or one that another adapter trains
            refuse_pruning(model, f"{type(host).__name__} embeds no tokens")
    depth = getattr(model.config, "num_hidden_layers", None)
    if len(hosts) == 1 and not model.config.is_encoder_decoder and depth not in (None, len(blocks[0][1])):
        refuse_pruning(model, f"it shares {len(blocks[0][1])} blocks among its {depth} layers")
    return ("alone",) if len(hosts) == 1 else ("encoder", "decoder")


def kept_layers(config: Any, depths: list[int]) -> list[list[int]]:
    """The blocks that get a side block, for each backbone counted from 0.

    Raises:
        ValueError: a layer does not exist, or a backbone would have none.
    """
    total, chosen = sum(depths), config.layers_to_keep
    layers = list(range(total)) if chosen is None else sorted(set(chosen))
    rule = f"names layer {layers[-1]}, which does not exist; this model has layers 0 to {total - 1}"
    check("layers_to_keep", chosen, layers[-1] < total, rule)
    kept, first = [], 0
    for depth in depths:
        kept.append([layer - first for layer in layers if first <= layer < first + depth])
        rule = f"keeps none of the layers {first} to {first + depth - 1}, but each backbone needs a side block"
        check("layers_to_keep", chosen, bool(kept[-1]), rule)
        first += depth
    return kept


def check_saved_whole(model: nn.Module, config: Any) -> None:
    """Refuse to train modules of the backbone, which no gradient reaches; BERT's pooler runs after it.

    Raises:
        ValueError: `modules_to_save` names such a module.
    """
    inside = tuple(backbones(model))
    named = tuple(config.modules_to_save or ())
    for path, _ in own_modules(model):
        frozen = bool(path) and covers(inside, path) and not path.endswith("pooler")
        rule = f"names {path}, a part of the backbone, which no gradient reaches under a ladder"
        check("modules_to_save", config.modules_to_save, not (frozen and path.endswith(named)), rule)


def pruned_body(model: PreTrainedModel, config: Any, importance: Importance | None) -> PreTrainedModel:
    """The model without its head, pruned to the side network's width."""
    body = cast(PreTrainedModel, model.base_model)
    if nn.Linear(1, 1).weight.is_meta:  # `low_cpu_mem_usage`: the weights will be loaded
        return type(body)(pruned_config(body, config.r, config.reduce))
    if importance is not None:  # the scores are of the model with its head, whose paths are longer
        above = "" if body is model else f"{model.base_model_prefix}."
        rows, columns = (
            {path.removeprefix(above): scores for path, scores in table.items() if path.startswith(above)}
            for table in (importance.rows, importance.columns)
        )
        importance = replace(importance, rows=rows, columns=columns)
    return pruned_copy(body, config.r, config.reduce, importance).model
