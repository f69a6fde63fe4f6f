"""The tuner layers outside attention: which output they change, and what they read for it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attach import Attached, child_name, hidden_states


class OnOutput(Attached):
    """y = host(x) becomes y + f(y): sequential adapters and biases."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        # a bias comes first among the host's hooks: it belongs to the host, whatever else sits there
        return [self.host.register_forward_hook(self.after, prepend=self.site.name == "bias")]

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return on_first(output, lambda y: self.add(y, y))


class OnInput(Attached):
    """y = host(x) becomes y + f(x): low-rank updates of a leaf, adapters parallel to a module."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        return [self.host.register_forward_hook(self.after, with_kwargs=True)]

    def after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return on_first(output, lambda y: self.add(y, hidden_states(args, kwargs)))


class OnNorm(Attached):
    """norm(s) becomes norm(s + f(norm(s))): Pfeiffer's place, where s is the FFN's output plus the residual."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        return [self.host.register_forward_hook(self.after, with_kwargs=True)]

    def after(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        s = hidden_states(args, kwargs)
        changed = self.add(s, output)
        if changed is s:
            return output
        output = norm.forward(changed)
        bias = getattr(norm, child_name("bias", "bias"), None)  # the norm's own trained bias stands beside this layer
        return output if bias is None else bias.after(norm, args, output)


class OnSpan(Attached):
    """y = last(... first(x)) becomes y + f(x), where x enters one module and y leaves another."""

    x: Tensor | None = None

    @property
    def passing(self) -> dict[str, None]:
        return {**super().passing, "x": None}

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        first = model.get_submodule(self.site.reads)
        return [
            first.register_forward_pre_hook(self.before, with_kwargs=True),
            self.host.register_forward_hook(self.after),
        ]

    def before(self, first: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = hidden_states(args, kwargs)

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x, self.x = self.x, None
        assert x is not None
        return on_first(output, lambda y: self.add(y, x))


def on_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a change to a module's output, or to the first element of a tuple, named or not."""
    if not isinstance(output, tuple):
        return change(output)
    make: Any = getattr(output, "_make", tuple)
    return make((change(output[0]), *output[1:]))
