"""The tuner layer of a ladder: watches a frozen backbone without its gradients, and puts the side network's output in
place of the backbone's own.
"""

import functools
import inspect
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..placement import check
from ..structure import stacks
from .side_cache import check_cache, side_cache
from .side_network import SideNetwork

NAME = "ladder"  # among the children of the backbone's first block
LEFT_OUT = ("output_attentions", "output_hidden_states", "return_dict", "past_key_values", "use_cache")

Role = Literal["alone", "encoder", "decoder"]


class Ladder(nn.Module, BaseTunerLayer):
    """The side networks, one for each adapter, of one backbone.

    - Before the backbone runs, gradients are turned off; afterwards they are as they were.
    - Each of its blocks shows its output to the rung of the side network.
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
        self._host = (host,)  # in a tuple: not a child
        self._blocks = tuple(next(stacks(host))[1])
        self._names = list(inspect.signature(host.forward).parameters)
        self.given: dict[str, Any] | None = None  # what the side network gets in this forward; None outside of one
        self._grad, self._tuple = True, False
        self._checkpointed: list[nn.Module] = []
        self._handles: list[RemovableHandle] = [
            host.register_forward_pre_hook(self.before, with_kwargs=True),
            host.register_forward_hook(self.after, always_call=True),
            *(b.register_forward_hook(functools.partial(self.show, i)) for i, b in enumerate(self._blocks)),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": None}

    @property
    def host(self) -> Any:
        return self._host[0]

    def get_base_layer(self) -> nn.Module:
        return self.host

    def put(self, adapter_name: str, side: SideNetwork, kept: list[int]) -> None:
        """Add the side network of an adapter, on the device of the backbone."""
        self.side_of[adapter_name] = side.train(self.host.training)
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
        for handle in self._handles:
            handle.remove()
        delattr(self._blocks[0], NAME)

    @property
    def acting(self) -> str | None:
        """The adapter whose side network runs."""
        present = [name for name in self.active_adapters if name in self.side_of]
        return None if self._disable_adapters or not present else present[0]

    def before(
        self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The backbone is about to run."""
        if self.acting is None:
            return None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        check_cache(given.get("past_key_values"))
        self.given = {key: value for key, value in given.items() if key not in LEFT_OUT}
        if self.role == "decoder":
            given["encoder_hidden_states"], self.given["encoder_hidden_states"] = self.taken_apart(given)
        self._tuple = not given.get("return_dict", host.config.return_dict)
        given["return_dict"] = True
        self._grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        # nothing of the backbone is computed twice, whatever checkpointing is on
        self._checkpointed = [m for m in (host, *self._blocks) if getattr(m, "gradient_checkpointing", False)]
        self.checkpoint(False)
        return (), given

    def show(self, index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A block of the backbone has run."""
        name = self.acting
        if self.given is not None and name is not None and index in self.kept[name]:
            with torch.set_grad_enabled(self._grad):
                rung = self.side_of[name].rungs[self.kept[name].index(index)]
                rung.show(output[0] if isinstance(output, tuple) else output)

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The backbone has run, or has failed (`output` is None then)."""
        given, self.given = self.given, None
        if given is None:
            return None
        torch.set_grad_enabled(self._grad)
        self.checkpoint(True)
        name = self.acting
        if output is None or name is None:
            return None
        side = self.side_of[name]
        last, cache = output.last_hidden_state, output.get("past_key_values")
        if cache is not None:
            given["past_key_values"] = side_cache(cache, side.stack.config, len(self._blocks), last.shape[1])
        states = side(**given, use_cache=cache is not None).to(last.dtype)
        output.last_hidden_state = torch.cat([last, states], -1) if self.role == "encoder" else states
        if output.get("pooler_output") is not None:
            output.pooler_output = self.host.pooler(states)
        return output.to_tuple() if self._tuple else output

    def taken_apart(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The backbone's part of the encoder's hidden states, and the side network's."""
        states: Tensor = given["encoder_hidden_states"]
        side = self.side_of[self.acting]
        d, d_side = self.host.config.hidden_size, side.stack.config.hidden_size
        rule = f"must be {d + d_side}: this adapter's encoder makes them; pass none that were made without it"
        check("encoder_outputs.shape[-1]", states.shape[-1], states.shape[-1] == d + d_side, rule)
        return states[..., :d], states[..., d:].to(side.up.weight.dtype)

    def checkpoint(self, enabled: bool) -> None:
        module: Any
        for module in self._checkpointed:
            module.gradient_checkpointing = enabled
