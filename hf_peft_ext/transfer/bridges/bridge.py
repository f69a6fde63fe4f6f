"""The bridge: a thin copy of the large model that the plugged module is trained in, so that the large one never is."""

import inspect
import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.structure import innermost, stacks
from hf_peft_ext.pruning import PrunedModel
from hf_peft_ext.transfer.bridges.activations import Activations
from hf_peft_ext.transfer.map.adapter_tensors import parts_of
from hf_peft_ext.transfer.map.parametrize import parametrize
from hf_peft_ext.transfer.map.plug import steps
from hf_peft_ext.transfer.map.projections import RESIDUAL, Init, Projections, Space
from hf_peft_ext.tuners.ladder.forward import RUNNING, Steps
from hf_peft_ext.tuners.ladder.network import SideBlock
from hf_peft_ext.validation.checks import check

TEMPERATURE = 0.1  # of a ladder's gates, as in ladder side-tuning
# An axis of `pruning`, less its layer -> the spaces of projections that lie along it.
SPACES_ALONG = {
    RESIDUAL: (RESIDUAL,),
    "heads": ("query", "heads"),
    "kv_heads": ("key", "value"),
    "ffn": ("ffn",),
}


def bridge(
    plugged: PeftModel,
    thin: PrunedModel,
    init: Init = "slice",
    trainable: bool | None = None,
    train_bridge: bool = True,
    ladder: bool = False,
    cache: str | Path | None = None,
) -> PeftModel:
    """The thin copy with the plugged module, each tensor seen through W_down; training it trains the plugged one.

    The bridge of the paper: module and bridge are trained together, by any trainer, and then the bridge is dropped.
    The module's tensors are those of the plugged model themselves, and so is W_plug. No gradient reaches the large
    model, and without a ladder it is not run, nor with one whose rows are all kept. Then it need not be there: cut and
    save the thin copy where the large model fits, and plug into one that has shapes alone.

        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(large))
        plugged = plug(small, shapes)
        model = bridge(plugged, PrunedModel.from_pretrained(folder, shapes))
        ...  # train it
        merge_projections(plugged).save_pretrained(adapter)  # for `PeftModel.from_pretrained` with the real model

    With a ladder, block i of the thin copy reads g_i x_i + (1 - g_i) W_i b_i, where b_i is what block i of the large
    model without its module reads (its embeddings, for the first) at the channels that the copy has, W_i begins as the
    identity and g_i at 0.5. So a copy that nothing was cut from gives the large model's logits, which ladder
    side-tuning, where b_i is what the large block gives, does not. In an encoder-decoder both stacks have side
    blocks. A bridge with a ladder takes whole rows, one for each answer; it does not generate.

    Args:
        plugged: what `plug` returned, or any large model with a LoRA or an adapter of this package.
        thin: the thin copy of its base model (`pruning.pruned_copy`).
        init: how W_down begins: "slice" (the bridge sees the channels that it has of the large model) or "orthogonal"
            (at random).
        trainable: whether W_down is trained; None for wherever it is no slice.
        train_bridge: whether the thin copy is trained with the module.
        ladder: whether what the large model makes of the tokens is let in.
        cache: folder that keeps the large model's part of a ladder, so that rows which were met before need no
            forward of it; None to run it each time.

    Raises:
        ValueError: the thin copy is not of this large model.
    """
    large = plugged.get_base_model()
    same = type(large) is type(thin.model)
    check("thin", type(thin.model).__name__, same, f"must be a copy of the large model, a {type(large).__name__}")
    down = Projections(init, trainable=init != "slice" if trainable is None else trainable, index=kept_channels(thin))
    activations = Activations(plugged, thin, cache) if ladder else None
    config: Any = deepcopy(plugged.active_peft_config)
    config.base_model_name_or_path, config.inference_mode = None, False
    given = {part.key: part for part in parts_of(plugged)}
    if hasattr(config, "fan_in_fan_out"):  # packed leaves of a large GPT-2 are turned round, the copy's are not
        leaves = (innermost(thin.model.get_submodule(part.host)) for part in given.values() if part.tensor == "A")
        config.fan_in_fan_out = any(isinstance(leaf, Conv1D) for leaf in leaves)
    model: Any = get_peft_model(thin.model, config)
    for part in parts_of(model):
        source = given[part.key]
        parametrize(part, source, steps(part, source, down), follows=True)
    thin.model.train(plugged.training)
    if train_bridge:
        own = {id(p) for p in plugged.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in own and ".seen_" not in name:
                parameter.requires_grad = True
    if activations is not None:
        put_ladder(model.get_base_model(), activations)
    return model


def put_ladder(thin: nn.Module, activations: Activations) -> None:
    """A rung in front of each block, which before each forward is shown its part of the large model."""
    first, d, names = next(thin.parameters()), len(activations.kept), list(inspect.signature(thin.forward).parameters)
    place = itertools.count()
    for _, blocks in list(stacks(thin)):
        for i, block in enumerate(blocks):
            rung = SideBlock(block, d, d, TEMPERATURE, next(place))
            nn.init.eye_(rung.down.weight)
            nn.init.zeros_(rung.down.bias)
            blocks[i] = rung.to(first.device, first.dtype)

    def climb(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = activations({**dict(zip(names, args, strict=False)), **kwargs})
        RUNNING.set(Steps(states=dict(enumerate(read for of_stack in states for read in of_stack))))

    def arrive(*_: Any) -> None:
        RUNNING.set(None)

    thin.register_forward_pre_hook(climb, with_kwargs=True)
    thin.register_forward_hook(arrive, always_call=True)


def kept_channels(thin: PrunedModel) -> dict[Space, Tensor]:
    """Space -> its channels that the thin copy has."""
    found: dict[Space, Tensor] = {}
    for axis, units in thin.kept.items():
        layer, _, name = axis.rpartition(".")
        cross, name = ("cross_" if name.startswith("cross_") else ""), name.removeprefix("cross_")
        if name in SPACES_ALONG and name.endswith("heads"):  # each of several channels
            inside = f"{layer}.{cross}head_dim"
            units = (units[:, None] * thin.channels.sizes[inside] + thin.kept[inside]).flatten()
        for space in SPACES_ALONG.get(name, ()):
            found[cross + space, int(layer) if layer else None] = units
    return found
