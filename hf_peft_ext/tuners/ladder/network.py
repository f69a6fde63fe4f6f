"""The side network of a ladder: narrow blocks beside a frozen backbone, which read its hidden states."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.structure import stacks
from hf_peft_ext.tuners.ladder.forward import running_steps

INDICES = {"layer_idx", "layer_id"}  # names of a block's index in its modules, under which they find their cache


class SideNetwork(nn.Module):
    """A pruned copy of a backbone whose blocks also read the hidden states of the backbone's blocks.

        h^0 = W_0 e,    h^i = block_i(g_i h^(i-1) + (1 - g_i) W_i b_i),    out = W_up norm(h^n)

    e are the backbone's embeddings of the tokens, b_i the output of its block i, both of width d; the side network has
    width d_side. Sung et al. 2022 (https://arxiv.org/abs/2206.06522), section 2.

    Args:
        stack: the pruned backbone, with the blocks to keep; its final norm is the side network's.
        host: the backbone; not a child of this module.
        temperature: T of the gates.
        ends: whether the output is projected to the backbone's width; that of an encoder with a decoder is not.
    """

    def __init__(self, stack: PreTrainedModel, host: PreTrainedModel, temperature: float, ends: bool):
        super().__init__()
        d, d_side = host.config.hidden_size, stack.config.hidden_size
        self._blocks, blocks = next(stacks(stack))
        for i, block in enumerate(blocks):
            blocks[i] = SideBlock(block, d, d_side, temperature, place=i)
        stack.set_input_embeddings(cast(nn.Embedding, DownEmbedding(host, stack)))
        self.stack = stack
        self.up = nn.Linear(d_side, d) if ends else None

    @property
    def side_blocks(self) -> tuple["SideBlock", ...]:
        """The side blocks, in the order of execution."""
        return tuple(cast(Any, self.stack.get_submodule(self._blocks)))

    def forward(self, **inputs: Any) -> Tensor:  # shape: (batch, length, d), or d_side without `up`
        """The last hidden states, computed while the backbone's `Steps` are running."""
        if inputs.get("inputs_embeds") is not None:
            embedding = cast(DownEmbedding, self.stack.get_input_embeddings())
            inputs["inputs_embeds"] = embedding.image(inputs["inputs_embeds"])
        h = self.stack(**inputs).last_hidden_state  # (batch, length, d_side)
        return h if self.up is None else self.up(h)

    @torch.no_grad()
    def init_from(self, other: "SideNetwork") -> None:
        """Copy the weights of another side network, except its projections and gates."""
        weights = dict(other.named_parameters())
        for name, parameter in self.named_parameters():
            if not {"down", "up", "alpha"} & {*name.split(".")}:
                parameter.copy_(weights[name])


class SideBlock(nn.Module):
    """A side block, and the gate between its own stream and the backbone's.

        h = block(g h_s + (1 - g) W b),    g = sigmoid(alpha / T),    alpha zero at the start

    b is the output of the backbone's block. Section 2.2 of the paper; W has a bias, and each block its own alpha.

    Args:
        block: the pruned block.
        d, d_side: widths of the backbone and of the side network.
        temperature: T.
        place: number of this side block among those that run in one forward.
    """

    def __init__(self, block: nn.Module, d: int, d_side: int, temperature: float, place: int):
        super().__init__()
        self.block = block
        self.down = nn.Linear(d, d_side)
        self.alpha = nn.Parameter(self.down.weight.new_zeros(1))
        self.temperature = temperature
        self.place = place

    def __getattr__(self, name: str) -> Any:
        # the stack reads attributes of its blocks, such as `attention_type`
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def image(
        self,
        b: Tensor,  # shape: (batch, length, d)
    ) -> Tensor:  # shape: (batch, length, d_side)
        """W b."""
        return self.down(b.to(self.down.weight))

    def forward(
        self,
        h: Tensor,  # shape: (batch, length, d_side)
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        steps = running_steps()
        step = steps.images.pop(self.place) if self.place in steps.images else self.image(steps.states.pop(self.place))
        gate = (self.alpha / self.temperature).sigmoid()
        return self.block(gate * h + (1 - gate) * step, *args, **kwargs)


class DownEmbedding(nn.Module):
    """W e(x): the backbone's embeddings of the tokens x, projected to the width of the side network's embeddings.

    The embedding module is looked up in each forward, since an adapter may have replaced it.

    Args:
        host: the backbone.
        stack: the pruned backbone.
    """

    def __init__(self, host: PreTrainedModel, stack: PreTrainedModel):
        super().__init__()
        d, d_side = (cast(nn.Embedding, model.get_input_embeddings()).weight.shape[1] for model in (host, stack))
        self.down = nn.Linear(d, d_side)

    def image(self, e: Tensor) -> Tensor:  # shape: (batch, length, d) -> (batch, length, d_side)
        """W e."""
        return self.down(e.to(self.down.weight))

    def forward(self, input_ids: Tensor) -> Tensor:  # shape: (batch, length) -> (batch, length, d_side)
        embed = running_steps().embed
        assert embed is not None
        if isinstance(embed.weight, DTensor):  # a unit of FSDP2 of its own, which is closed again
            table = {"weight": embed.weight.full_tensor()}
            return self.image(functional_call(embed, table, (input_ids,)))
        return self.image(embed(input_ids))


def backbones(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Path -> backbone: the innermost model around each stack of blocks.

    A decoder or an encoder has one, an encoder-decoder two, encoder before decoder.
    """
    modules = {path: module for path, module in own_modules(model) if isinstance(module, PreTrainedModel)}
    hosts: dict[str, PreTrainedModel] = {}
    for stack, _ in stacks(model):
        above = [path for path in modules if not path or stack.startswith(f"{path}.")]
        hosts[above[-1]] = modules[above[-1]]
    return hosts


def cut_depth(stack: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """Drop all blocks but those kept, in place, and renumber the rest."""
    _, blocks = next(stacks(stack))
    dropped = blocks[0]
    stack.config = copy.deepcopy(stack.config)
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if hasattr(stack.config, name):
            setattr(stack.config, name, len(kept))
    if getattr(stack.config, "layer_types", None):
        stack.config.layer_types = [stack.config.layer_types[i] for i in kept]
    chosen = [blocks[i] for i in kept]
    del blocks[:]
    blocks.extend(chosen)
    module: Any
    for i, block in enumerate(chosen):
        for module in block.modules():
            for name in INDICES & vars(module).keys():
                setattr(module, name, i)
    if 0 not in kept:
        move_position_bias(dropped, chosen[0])
    return stack


def move_position_bias(dropped: nn.Module, first: nn.Module) -> None:
    """Move T5's table of relative positions, which the first block holds for all, to the new first block."""
    owner: Any
    for name, module in dropped.named_modules():
        if getattr(module, "has_relative_attention_bias", False):
            owner = first.get_submodule(name)
            owner.has_relative_attention_bias, owner.relative_attention_bias = True, module.relative_attention_bias
