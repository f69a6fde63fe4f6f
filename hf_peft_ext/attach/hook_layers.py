"""The tuner layers outside attention: which output they change, and what they read for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_peft_ext.attach.forward_state import FORWARD, new_key
from hf_peft_ext.attach.layer import TunerLayer, child_name, hidden_states


class AddToOutput(TunerLayer):
    """y = host(x) becomes y + f(y): sequential adapters and biases."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        # Before the other hooks of the host: a bias belongs to the host, and what a block returns is recorded by hooks
        # of transformers (hidden states), which must see what the next block reads.
        first = self.site.name in ("bias", "after_residual")
        return [self.host.register_forward_hook(partial(add_to_output, self.name), prepend=first)]


def add_to_output(name: str, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    layer = getattr(host, name)
    return on_first(output, lambda y: layer.add(y, y))


class AddOfInput(TunerLayer):
    """y = host(x) becomes y + f(x): low-rank updates of a leaf, adapters parallel to a module."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        return [self.host.register_forward_hook(partial(add_of_input, self.name), with_kwargs=True)]


def add_of_input(name: str, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    layer = getattr(host, name)
    return on_first(output, lambda y: layer.add(y, hidden_states(args, kwargs)))


class AddBeforeNorm(TunerLayer):
    """norm(s) becomes norm(s + f(norm(s))): Pfeiffer's place, where s is the FFN's output plus the residual.

    The layer is a child of the module in front of the norm, not of the norm: transformers' Trainer exempts from weight
    decay whatever lies inside a norm. So that module hands its layer to the hook of the norm. It lies inside the
    block, whose own hooks do not run again when gradient checkpointing computes it anew.
    """

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        key = new_key(self.site.host)
        return [
            self.holder.register_forward_pre_hook(partial(hand_layer, key, self.name)),
            self.host.register_forward_hook(partial(add_before_norm, key), with_kwargs=True),
        ]


def hand_layer(key: str, name: str, holder: nn.Module, args: tuple[Any, ...]) -> None:
    FORWARD.hand_on(key, getattr(holder, name))


def add_before_norm(key: str, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    layer, s = FORWARD.values.pop(key), hidden_states(args, kwargs)
    changed = layer.add(s, output)
    if changed is s:
        return output
    output = norm.forward(changed)
    bias = getattr(norm, child_name("bias", "bias"), None)  # the norm's own trained bias stands beside this layer
    return output if bias is None else bias.add(output, output)


class AddOfSpan(TunerLayer):
    """y = last(... first(x)) becomes y + f(x), where x enters one module and y leaves another."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        key, first = new_key(self.site.host), model.get_submodule(self.site.reads)
        return [
            first.register_forward_pre_hook(partial(hand_input, key), with_kwargs=True),
            self.host.register_forward_hook(partial(add_of_span, key, self.name)),
        ]


def hand_input(key: str, first: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    FORWARD.hand_on(key, hidden_states(args, kwargs))


def add_of_span(key: str, name: str, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    layer, x = getattr(host, name), FORWARD.values.pop(key)
    return on_first(output, lambda y: layer.add(y, x))


def on_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a change to a module's output, or to the first element of a tuple, named or not."""
    if not isinstance(output, tuple):
        return change(output)
    make: Any = getattr(output, "_make", tuple)
    return make((change(output[0]), *output[1:]))
