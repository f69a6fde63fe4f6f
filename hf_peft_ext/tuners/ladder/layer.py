"""The tuner layer of a ladder: a frozen backbone runs without gradients, and its side network computes the output."""

import inspect
import types
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_peft_ext.model.structure import CACHES, given_cache, stacks
from hf_peft_ext.tuners.ladder.cache import check_cache, side_cache
from hf_peft_ext.tuners.ladder.forward import Steps, enter, leave, not_checkpointed, record_output, running
from hf_peft_ext.tuners.ladder.network import SideNetwork
from hf_peft_ext.validation.checks import check

CHILD = "ladder"  # among the children of the backbone's first block
LEFT_OUT = ("output_attentions", "output_hidden_states", "return_dict", "use_cache", *CACHES)

Role = Literal["alone", "encoder", "decoder"]


class Ladder(nn.Module, BaseTunerLayer):
    """The side networks of one backbone, one for each adapter.

    - The backbone runs without gradients; the outputs of its blocks are recorded for the side blocks.
    - Then the side network runs on the same inputs, and the backbone returns its output, added to its own.

    The encoder of an encoder-decoder returns both networks' hidden states, concatenated: d + d_side channels. So both
    take part in everything that generation does to encoder outputs. The decoder splits them again.

    Args:
        host: the backbone.
        role: "encoder" and "decoder" are the two of an encoder-decoder.
    """

    adapter_layer_names = ("side_of",)

    side_of: Any  # adapter name -> side network

    def __init__(self, host: PreTrainedModel, role: Role):
        super().__init__()
        self.side_of = nn.ModuleDict()
        self.role: Role = role
        self.kept: dict[str, list[int]] = {}  # adapter name -> the blocks that have a side block
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self._host = (host,)  # in a tuple, so that it is no child; a copy's forward passes its own
        self._path, blocks = next(stacks(host))
        self._names = list(inspect.signature(host.forward).parameters)
        self._handles: list[RemovableHandle] = [block.register_forward_hook(record_output) for block in blocks]
        enter(host, f"{self._path}.0.{CHILD}")

    def get_base_layer(self) -> nn.Module:
        """The backbone."""
        return self._host[0]

    def put(self, adapter_name: str, side: SideNetwork, kept: list[int]) -> None:
        """Add the side network of an adapter, on the device of the backbone.

        Args:
            adapter_name: the adapter.
            side: its side network.
            kept: the blocks of the backbone that have a side block.
        """
        self.side_of[adapter_name] = side.train(self.get_base_layer().training)
        self.kept[adapter_name] = kept
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        own = [p for name, p in base_layer.named_parameters() if ".side_of." not in name and not p.is_meta]
        types = (p.dtype for p in own if p.dtype.is_floating_point)
        return (own[0].device, next(types, None)) if own else (None, None)

    def drop(self, adapter_name: str) -> None:
        """Remove the side network of an adapter, if there is one."""
        self.kept.pop(adapter_name, None)
        if adapter_name in self.side_of:
            del self.side_of[adapter_name]

    def remove(self) -> None:
        """Remove this layer from its backbone."""
        host: Any = self.get_base_layer()
        for handle in self._handles:
            handle.remove()
        leave(host)
        delattr(host.get_submodule(f"{self._path}.0"), CHILD)

    @property
    def acting(self) -> str | None:
        """The adapter whose side network runs."""
        present = [name for name in self.active_adapters if name in self.side_of]
        return None if self._disable_adapters or not present else present[0]

    def run(self, host: Any, backbone: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of a backbone with a ladder.

        Args:
            host: the backbone, or a copy of it.
            backbone: its own forward.
            args, kwargs: the arguments of the call.

        Raises:
            ValueError: the cache or the encoder outputs were made without this ladder.
        """
        name = self.acting
        if name is None:
            return backbone(*args, **kwargs)
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        check_cache(inputs)
        own = {key: value for key, value in inputs.items() if key not in LEFT_OUT}
        if self.role == "decoder":
            inputs["encoder_hidden_states"], own["encoder_hidden_states"] = self.split_states(host, inputs)
        as_model = inputs.get("return_dict")
        as_model = host.config.return_dict if as_model is None else as_model
        blocks: Any = host.get_submodule(self._path)
        with running(self.steps(host, blocks, name)):
            with torch.no_grad(), not_checkpointed(host, blocks):
                output = backbone(**{**inputs, "return_dict": True})
            own |= self.cache_of(output, len(blocks), name)
            states = beside(blocks[0])(name, own).to(output.last_hidden_state)
        if self.side_of[name].adds:
            states = output.last_hidden_state + states
        self.replace_states(host, output, states)
        return output if as_model else output.to_tuple()

    def steps(self, host: Any, blocks: nn.ModuleList, name: str) -> Steps:
        """Empty records for one forward of a backbone."""
        side: SideNetwork = self.side_of[name]
        side_blocks = {blocks[i]: side_block for i, side_block in zip(self.kept[name], side.side_blocks, strict=True)}
        sharded = any(isinstance(m, FSDPModule) for m in (blocks[0], self, side, *side.side_blocks))
        return Steps(host.get_input_embeddings(), side_blocks, deferred=sharded)

    def cache_of(self, output: Any, n_blocks: int, name: str) -> dict[str, Any]:
        """The arguments that pass the side network its part of the backbone's cache."""
        cache, side = given_cache(output), self.side_of[name]
        keyword = next((key for key in CACHES if key in self._names), None)
        if cache is None or keyword is None:
            return {"use_cache": False} if "use_cache" in self._names else {}
        n_tokens = output.last_hidden_state.shape[1]
        return {keyword: side_cache(cache, side.stack.config, n_blocks, n_tokens), "use_cache": True}

    def forward(self, adapter_name: str, inputs: dict[str, Any]) -> Tensor:
        """The output of a side network; see `SideNetwork.forward`."""
        return self.side_of[adapter_name](**inputs)

    def replace_states(self, host: Any, output: Any, states: Tensor) -> None:
        """Put these last hidden states in place of the backbone's; behind them, in an encoder."""
        last = output.last_hidden_state
        output.last_hidden_state = torch.cat([last, states], -1) if self.role == "encoder" else states
        hidden = output.get("hidden_states")
        if hidden is not None and hidden[-1] is not None:
            output.hidden_states = (*hidden[:-1], output.last_hidden_state)
        if output.get("pooler_output") is not None:
            output.pooler_output = host.pooler(states)

    def split_states(self, host: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Split the encoder's hidden states (batch, length, d + d_side) into the backbone's and the side network's.

        Raises:
            ValueError: they have another width.
        """
        states: Tensor = inputs["encoder_hidden_states"]
        side = self.side_of[self.acting]
        d, d_side = host.config.hidden_size, side.stack.config.hidden_size
        rule = f"must be {d + d_side}: this adapter's encoder makes them; pass none that were made without it"
        check("encoder_outputs.shape[-1]", states.shape[-1], states.shape[-1] == d + d_side, rule)
        return states[..., :d], states[..., d:].to(side.up.weight.dtype)


def beside(block: Any) -> Callable[..., Tensor]:
    """The ladder of a block, as a function. If FSDP2 has sharded the block, the call gathers its weights first."""
    if not isinstance(block, FSDPModule):
        return getattr(block, CHILD)
    if "run_ladder" not in vars(block):
        vars(block)["run_ladder"] = types.MethodType(run_ladder, block)
        register_fsdp_forward_method(cast(nn.Module, block), "run_ladder")
    return vars(block)["run_ladder"]


def run_ladder(block: Any, *args: Any) -> Tensor:
    """Run the ladder of a block; a method of blocks that FSDP2 has sharded."""
    return getattr(block, CHILD)(*args)
