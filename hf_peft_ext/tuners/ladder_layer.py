"""The tuner layer of a ladder: runs a frozen backbone without its gradients, and puts the side network's output in
place of the backbone's own.
"""

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

from ..placement import check
from ..structure import CACHES, given_cache, stacks
from .side_cache import check_cache, side_cache
from .side_forward import Steps, enter, leave, not_checkpointed, running, show
from .side_network import SideNetwork

NAME = "ladder"  # among the children of the backbone's first block
LEFT_OUT = ("output_attentions", "output_hidden_states", "return_dict", "use_cache", *CACHES)

Role = Literal["alone", "encoder", "decoder"]


class Ladder(nn.Module, BaseTunerLayer):
    """The side networks, one for each adapter, of one backbone.

    - The backbone runs without gradients; each of its blocks leaves its output to the rung of the side network.
    - Then the side network runs on the same inputs, and its output is what the backbone returns.

    An encoder that a decoder reads returns its hidden states with the thin ones behind them, d + d_side wide: so both
    pass through all that happens to encoder outputs in generation. The decoder takes them apart again.

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
        self.kept: dict[str, list[int]] = {}  # adapter name -> the blocks that have a rung
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self._host = (host,)  # in a tuple: not a child; a copy's forward is given another one
        self._path, blocks = next(stacks(host))
        self._names = list(inspect.signature(host.forward).parameters)
        self._handles: list[RemovableHandle] = [block.register_forward_hook(show) for block in blocks]
        enter(host, f"{self._path}.0.{NAME}")

    def get_base_layer(self) -> nn.Module:
        return self._host[0]

    def put(self, adapter_name: str, side: SideNetwork, kept: list[int]) -> None:
        """Add the side network of an adapter, on the device of the backbone."""
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
        """Take the side network of an adapter out, if there is one."""
        self.kept.pop(adapter_name, None)
        if adapter_name in self.side_of:
            del self.side_of[adapter_name]

    def remove(self) -> None:
        """Take this layer off its backbone."""
        host: Any = self.get_base_layer()
        for handle in self._handles:
            handle.remove()
        leave(host)
        delattr(host.get_submodule(f"{self._path}.0"), NAME)

    @property
    def acting(self) -> str | None:
        """The adapter whose side network runs."""
        present = [name for name in self.active_adapters if name in self.side_of]
        return None if self._disable_adapters or not present else present[0]

    def run(self, host: Any, backbone: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of a backbone.

        Args:
            host: the backbone, or a copy of it.
            backbone: its own forward.
            args, kwargs: what it is called with.
        """
        name = self.acting
        if name is None:
            return backbone(*args, **kwargs)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        check_cache(given)
        own = {key: value for key, value in given.items() if key not in LEFT_OUT}
        if self.role == "decoder":
            given["encoder_hidden_states"], own["encoder_hidden_states"] = self.taken_apart(host, given)
        as_model = given.get("return_dict")
        as_model = host.config.return_dict if as_model is None else as_model
        blocks: Any = host.get_submodule(self._path)
        with running(self.steps(host, blocks, name)):
            with torch.no_grad(), not_checkpointed(host, blocks):
                output = backbone(**{**given, "return_dict": True})
            own |= self.cache_of(output, len(blocks), name)
            states = beside(blocks[0])(name, own).to(output.last_hidden_state)
        self.give(host, output, states)
        return output if as_model else output.to_tuple()

    def steps(self, host: Any, blocks: nn.ModuleList, name: str) -> Steps:
        """What the blocks of a backbone leave to the rungs."""
        side: SideNetwork = self.side_of[name]
        rungs = {blocks[i]: rung for i, rung in zip(self.kept[name], side.rungs, strict=True)}
        sharded = any(isinstance(m, FSDPModule) for m in (blocks[0], self, side, *side.rungs))
        return Steps(host.get_input_embeddings(), rungs, deferred=sharded)

    def cache_of(self, output: Any, n_blocks: int, name: str) -> dict[str, Any]:
        """The arguments by which the side network gets its part of the backbone's cache."""
        cache, side = given_cache(output), self.side_of[name]
        keyword = next((key for key in CACHES if key in self._names), None)
        if cache is None or keyword is None:
            return {"use_cache": False} if "use_cache" in self._names else {}
        n_tokens = output.last_hidden_state.shape[1]
        return {keyword: side_cache(cache, side.stack.config, n_blocks, n_tokens), "use_cache": True}

    def forward(self, adapter_name: str, given: dict[str, Any]) -> Tensor:
        """The last hidden states of a side network; see `SideNetwork`."""
        return self.side_of[adapter_name](**given)

    def give(self, host: Any, output: Any, states: Tensor) -> None:
        """Put the side network's last hidden states in place of the backbone's."""
        last = output.last_hidden_state
        output.last_hidden_state = torch.cat([last, states], -1) if self.role == "encoder" else states
        found = output.get("hidden_states")
        if found is not None and found[-1] is not None:
            output.hidden_states = (*found[:-1], output.last_hidden_state)
        if output.get("pooler_output") is not None:
            output.pooler_output = host.pooler(states)

    def taken_apart(self, host: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The backbone's part of the encoder's hidden states, and the side network's."""
        states: Tensor = given["encoder_hidden_states"]
        side = self.side_of[self.acting]
        d, d_side = host.config.hidden_size, side.stack.config.hidden_size
        rule = f"must be {d + d_side}: this adapter's encoder makes them; pass none that were made without it"
        check("encoder_outputs.shape[-1]", states.shape[-1], states.shape[-1] == d + d_side, rule)
        return states[..., :d], states[..., d:].to(side.up.weight.dtype)


def beside(block: Any) -> Callable[..., Tensor]:
    """The ladder of a block, to be called. If FSDP2 has sharded the block, the call gathers its weights, as one of the
    block's own forwards.
    """
    if not isinstance(block, FSDPModule):
        return getattr(block, NAME)
    if "run_ladder" not in vars(block):
        vars(block)["run_ladder"] = types.MethodType(run_ladder, block)
        register_fsdp_forward_method(cast(nn.Module, block), "run_ladder")
    return vars(block)["run_ladder"]


def run_ladder(block: Any, *args: Any) -> Tensor:
    return getattr(block, NAME)(*args)
