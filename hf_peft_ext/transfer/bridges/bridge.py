"""The paper's bridge: a pruned copy of the large model, in which the plugged adapters are trained."""

import inspect
import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.structure import innermost, stacks
from hf_peft_ext.pruning import PrunedModel
from hf_peft_ext.pruning.channels import RESIDUAL
from hf_peft_ext.transfer.bridges.activations import Activations
from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensors
from hf_peft_ext.transfer.map.parametrize import Projected, parametrize
from hf_peft_ext.transfer.map.plug import attach, steps
from hf_peft_ext.transfer.map.projections import Init, Projections, Space
from hf_peft_ext.tuners.ladder.forward import RUNNING, Steps
from hf_peft_ext.tuners.ladder.network import SideBlock
from hf_peft_ext.validation.checks import check

TEMPERATURE = 0.1  # of a ladder's gates, as in ladder side-tuning
# Axis of `pruning`, without its layer -> the spaces of projections along it.
SPACES_ALONG = {
    RESIDUAL: (RESIDUAL,),
    "heads": ("query", "heads"),
    "kv_heads": ("key", "value"),
    "ffn": ("ffn",),
}


def bridge(
    plugged: PeftModel,
    pruned: PrunedModel,
    init: Init = "slice",
    trainable: bool | None = None,
    train_bridge: bool = True,
    ladder: bool = False,
    cache: str | Path | None = None,
) -> PeftModel:
    """The pruned copy with the plugged adapters, computed through W_down; training it trains the plugged ones.

    The bridge of the paper: adapters and bridge are trained together, by any trainer, and then the bridge is dropped.
    The adapters' tensors are those of the plugged model themselves, and so is W_plug. No gradient reaches the large
    model, and it is not run, except by a ladder on rows that are not cached. So the large model may be absent: prune
    and save the copy where the large model fits, and plug into a model on the meta device.

        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(large))
        plugged = plug(small, shapes)
        model = bridge(plugged, PrunedModel.from_pretrained(folder, shapes))
        ...  # train it
        merge_projections(plugged).save_pretrained(adapter)  # for `PeftModel.from_pretrained` with the real model

    With a ladder, block i of the pruned copy reads g_i x_i + (1 - g_i) W_i b_i. b_i is the input of block i of the
    large model without its adapters (its embeddings, for the first) at the channels that the copy has. W_i begins as
    the identity and g_i at 0.5. With r = 1 it then gives the large model's logits. Ladder side-tuning does not: there
    b_i is the output of the large block. In an encoder-decoder both stacks have side blocks. A bridge with a ladder
    takes whole rows, one for each answer; it does not generate.

    Args:
        plugged: what `plug` returned, or any large model with LoRAs or adapters of this package.
        pruned: the pruned copy of its base model (`pruning.pruned_copy`).
        init: how W_down begins: "slice" (the channels that the copy kept) or "orthogonal" (random).
        trainable: whether W_down is trained; None for True unless it is a slice.
        train_bridge: whether the pruned copy is trained with the adapters.
        ladder: whether the copy's blocks also read the inputs of the large model's blocks.
        cache: folder for the large model's states, so that it runs once on each row; None to run it each time.

    Returns:
        The pruned copy with the adapters' tensors.

    Raises:
        ValueError: the pruned copy is not of this large model.
    """
    return paper_bridge(AdapterTensors(plugged), pruned, init, trainable, train_bridge, ladder, cache)


def paper_bridge(
    source: AdapterTensors,
    pruned: PrunedModel,
    init: Init = "slice",
    trainable: bool | None = None,
    train_bridge: bool = True,
    ladder: bool = False,
    cache: str | Path | None = None,
) -> PeftModel:
    """As `bridge`, from tensors of the plugged model that were read already."""
    plugged = source.model
    down = Projections(
        init, trainable=init != "slice" if trainable is None else trainable, index=kept_channels(pruned)
    )
    activations = Activations(plugged, pruned, cache) if ladder else None
    model = pruned_bridge(source, pruned, down).model
    pruned.model.train(plugged.training)
    if train_bridge:
        train_copy(model, plugged)
    if activations is not None:
        put_ladder(model.get_base_model(), activations)
    return model


def pruned_bridge(source: AdapterTensors, pruned: PrunedModel, down: Projections) -> AdapterTensors:
    """The pruned copy with the adapters of the large model, their tensors computed from those of `source`.

    Args:
        down: W_down.

    Raises:
        ValueError: the pruned copy is not of this large model.
    """
    large = source.model.get_base_model()
    same = type(large) is type(pruned.model)
    check("pruned", type(pruned.model).__name__, same, f"must be a copy of the large model, a {type(large).__name__}")
    of_large = source.by_key()
    hosts = (tensor.host for tensor in source if tensor.tensor == "A")
    packed = any(isinstance(innermost(pruned.model.get_submodule(host)), Conv1D) for host in hosts)
    configs: dict[str, Any] = {name: deepcopy(source.model.peft_config[name]) for name in source.adapters}
    for config in configs.values():
        config.base_model_name_or_path, config.inference_mode = None, False
        if hasattr(config, "fan_in_fan_out"):  # quantized leaves of a large GPT-2 are transposed, the copy's are not
            config.fan_in_fan_out = packed
    copy = AdapterTensors(attach(pruned.model, configs))
    for tensor in copy:
        other = of_large[tensor.key]
        parametrize(tensor, other, steps(tensor, other, down), follow=True)
    return copy


def train_copy(model: PeftModel, plugged: PeftModel) -> None:
    """Have the weights of the pruned copy trained; tensors of the plugged model and W_down keep their flags."""
    adapters = (p for module in model.modules() if isinstance(module, Projected) for p in module.parameters())
    others = {id(p) for p in (*plugged.parameters(), *adapters)}
    for parameter in model.parameters():
        if id(parameter) not in others:
            parameter.requires_grad = True


def put_ladder(copy: nn.Module, activations: Activations) -> None:
    """Wrap each block in a side block, which receives the large model's states before each forward."""
    first, d, names = next(copy.parameters()), len(activations.kept), list(inspect.signature(copy.forward).parameters)
    place = itertools.count()
    for _, blocks in list(stacks(copy)):
        for i, block in enumerate(blocks):
            side = SideBlock(block, d, d, TEMPERATURE, next(place))
            nn.init.eye_(side.down.weight)
            nn.init.zeros_(side.down.bias)
            blocks[i] = side.to(first.device, first.dtype)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = activations({**dict(zip(names, args, strict=False)), **kwargs})
        RUNNING.set(Steps(states=dict(enumerate(read for of_stack in states for read in of_stack))))

    def after(*_: Any) -> None:
        RUNNING.set(None)

    copy.register_forward_pre_hook(before, with_kwargs=True)
    copy.register_forward_hook(after, always_call=True)


def kept_channels(pruned: PrunedModel) -> dict[Space, Tensor]:
    """Space -> its channels that the pruned copy kept."""
    channels: dict[Space, Tensor] = {}
    for axis, units in pruned.kept.items():
        layer, _, name = axis.rpartition(".")
        cross, name = ("cross_" if name.startswith("cross_") else ""), name.removeprefix("cross_")
        if name in SPACES_ALONG and name.endswith("heads"):  # each of several channels
            inside = f"{layer}.{cross}head_dim"
            units = (units[:, None] * pruned.channels.sizes[inside] + pruned.kept[inside]).flatten()
        for space in SPACES_ALONG.get(name, ()):
            channels[cross + space, int(layer) if layer else None] = units
    return channels
