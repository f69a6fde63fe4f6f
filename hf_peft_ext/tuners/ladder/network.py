"""The side network of a ladder: thin blocks that climb beside a frozen backbone and take its hidden states in."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_peft_ext.model.structure import own_modules, stacks
from hf_peft_ext.tuners.ladder.forward import the_running


class SideNetwork(nn.Module):
    """A thin copy of a backbone, fed at each block with the hidden states of the backbone's own.

        h^0 = W_0 e,    h^i = block_i(g_i h^(i-1) + (1 - g_i) W_i b_i),    out = W_up norm(h^n)

    e are the backbone's embeddings of the tokens, b_i the output of its block i, both of width d; the side network is
    d_s wide. Sung et al. 2022 (https://arxiv.org/abs/2206.06522), section 2.

    Args:
        stack: the thin backbone, with the blocks to keep; its norm at the end is the side network's.
        host: the backbone; not a child of this module.
        temperature: T of the gates.
        ends: whether the output goes back to the backbone's width; an encoder that a decoder reads stays thin.
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
        return tuple(cast(Any, self.stack.get_submodule(self._blocks)))

    def forward(self, **given: Any) -> Tensor:  # shape: (batch, length, d), or d_side without `up`
        """The last hidden states. The steps that the backbone left are running."""
        if given.get("inputs_embeds") is not None:
            embedding = cast(DownEmbedding, self.stack.get_input_embeddings())
            given["inputs_embeds"] = embedding.image(given["inputs_embeds"])
        h = self.stack(**given).last_hidden_state
        return h if self.up is None else self.up(h)

    @torch.no_grad()
    def init_from(self, other: "SideNetwork") -> None:
        """Take over the weights of another one, but for the projections and gates, which are between it and a host."""
        weights = dict(other.named_parameters())
        for name, parameter in self.named_parameters():
            if not {"down", "up", "alpha"} & {*name.split(".")}:
                parameter.copy_(weights[name])


class SideBlock(nn.Module):
    """A side block, and how much of the backbone it takes in.

        h = block(g h_s + (1 - g) W b),    g = sigmoid(alpha / T),    alpha zero at the start

    b is what the backbone's block has given. Section 2.2 of the paper; W with a bias, one alpha for each block.

    Args:
        block: the side block.
        d, d_side: widths of the backbone and of the side network.
        temperature: T.
        place: number of this rung among those that run in one forward.
    """

    def __init__(self, block: nn.Module, d: int, d_side: int, temperature: float, place: int):
        super().__init__()
        self.block = block
        self.down = nn.Linear(d, d_side)
        self.alpha = nn.Parameter(self.down.weight.new_zeros(1))
        self.temperature = temperature
        self.place = place

    def __getattr__(self, name: str) -> Any:
        # the stack asks its blocks for what they are (such as `attention_type`)
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
        steps = the_running()
        step = steps.images.pop(self.place) if self.place in steps.images else self.image(steps.states.pop(self.place))
        gate = (self.alpha / self.temperature).sigmoid()
        return self.block(gate * h + (1 - gate) * step, *args, **kwargs)


class DownEmbedding(nn.Module):
    """W e(x): the backbone's embeddings of the tokens x, whatever module makes them by then, at the side's width."""

    def __init__(self, host: PreTrainedModel, stack: PreTrainedModel):
        super().__init__()
        d, d_side = (cast(nn.Embedding, model.get_input_embeddings()).weight.shape[1] for model in (host, stack))
        self.down = nn.Linear(d, d_side)

    def image(self, e: Tensor) -> Tensor:  # shape: (batch, length, d) -> (batch, length, d_side)
        return self.down(e.to(self.down.weight))

    def forward(self, input_ids: Tensor) -> Tensor:  # shape: (batch, length) -> (batch, length, d_side)
        embed = the_running().embed
        assert embed is not None
        if isinstance(embed.weight, DTensor):  # a unit of FSDP2 of its own, which is closed again
            table = {"weight": embed.weight.full_tensor()}
            return self.image(functional_call(embed, table, (input_ids,)))
        return self.image(embed(input_ids))


def backbones(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Path -> module, of each model inside that embeds tokens and runs them through one stack of blocks.

    That is one in a decoder or an encoder, two in an encoder-decoder, encoder before decoder.
    """
    modules = {path: module for path, module in own_modules(model) if isinstance(module, PreTrainedModel)}
    found: dict[str, PreTrainedModel] = {}
    for stack, _ in stacks(model):
        above = [path for path in modules if not path or stack.startswith(f"{path}.")]
        found[above[-1]] = modules[above[-1]]
    return found


def cut_depth(stack: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """Drop all blocks but those kept, in place, and count the others anew."""
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
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    if 0 not in kept:
        hand_down_position_bias(dropped, chosen[0])
    return stack


def hand_down_position_bias(dropped: nn.Module, first: nn.Module) -> None:
    """Give T5's table of relative positions, which its first block has for all, to the block that is first now."""
    heir: Any
    for name, module in dropped.named_modules():
        if getattr(module, "has_relative_attention_bias", False):
            heir = first.get_submodule(name)
            heir.has_relative_attention_bias, heir.relative_attention_bias = True, module.relative_attention_bias
