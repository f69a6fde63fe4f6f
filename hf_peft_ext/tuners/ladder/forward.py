"""The forward of a backbone with a ladder: how it gets to the ladder, and what it notes on its way.

A forward keeps nothing on a module: threads may share one model, and copies of modules share what they hold.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_peft_ext.validation.checks import check

PATH = "_ladder_path"  # attribute of a backbone: where its ladder is


@dataclass
class Steps:
    """What one forward of a backbone leaves for the side network.

    Args:
        embed: the backbone's embeddings of tokens.
        side_blocks: block of the backbone -> the rung that reads its output.
        deferred: whether the side_blocks cannot compute yet, because their weights are sharded.
        grad: whether gradients are asked for.
        images: place of a rung -> its thin image of the block's output.
        states: place of a rung -> the block's output itself.
    """

    embed: nn.Module | None = None
    side_blocks: dict[nn.Module, Any] = field(default_factory=dict)
    deferred: bool = False
    grad: bool = field(default_factory=torch.is_grad_enabled)
    images: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)

    def show(self, block: nn.Module, output: Any) -> None:
        """A block has run; if it has a rung, keep its output, or better only the thin image of it."""
        rung = self.side_blocks.get(block)
        if rung is None:
            return
        b = output[0] if isinstance(output, tuple) else output
        if self.deferred:
            self.states[rung.place] = b
        else:
            with torch.set_grad_enabled(self.grad):
                self.images[rung.place] = rung.image(b)


RUNNING: ContextVar[Steps | None] = ContextVar("steps", default=None)


@contextmanager
def running(steps: Steps) -> Iterator[None]:
    """Within, `steps` are those of this thread's forward."""
    token = RUNNING.set(steps)
    try:
        yield
    finally:
        RUNNING.reset(token)


def the_running() -> Steps:
    """The steps of this thread's forward."""
    steps = RUNNING.get()
    assert steps is not None, "a side network runs beside its backbone only"
    return steps


def show(block: nn.Module, args: Any, output: Any) -> None:
    """The hook on each block of a backbone. It is bound to no ladder, so that copies of the block have it too."""
    steps = RUNNING.get()
    if steps is not None:
        steps.show(block, output)


@contextmanager
def not_checkpointed(host: nn.Module, blocks: nn.ModuleList) -> Iterator[None]:
    """Within, checkpointing is off in a backbone that is trained: nothing of it is computed twice."""
    module: Any
    found = [m for m in (host, *blocks) if m.training and getattr(m, "gradient_checkpointing", False)]
    try:
        for module in found:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in found:
            module.gradient_checkpointing = True


@functools.cache
def laddered(kind: type) -> type:
    """The class of a backbone with a ladder, as torch's parametrize and FSDP2 make theirs.

    `forward` goes through the ladder by whatever way it is called. All else is the class itself.
    """

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(kind.forward, self)
        path = vars(self).get(PATH)
        return plain(*args, **kwargs) if path is None else self.get_submodule(path).run(self, plain, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        make, (_, *rest), *state = cast(Any, kind).__reduce_ex__(self, protocol)  # pickle finds classes by their names
        return (made_again, (make, kind, *rest), *state)

    own = {"forward": forward, "__reduce_ex__": reduce, "plain": kind}
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**own, **named})


def made_again(make: Callable[..., Any], kind: type, *rest: Any) -> Any:
    """An empty backbone with a ladder, for a copy or from a pickle."""
    return make(laddered(kind), *rest)


def check_forward(host: nn.Module) -> None:
    """Refuse a backbone whose forward was replaced on the object; accelerate keeps the one that it wraps."""
    replaced = "forward" in vars(host) and "_old_forward" not in vars(host)
    rule = "must have the forward of its class, which a ladder goes through; put the ladder in first"
    check("model", type(host).__name__, not replaced, rule)


def enter(host: Any, path: str) -> None:
    """Let the forward of a backbone go through the ladder at `path`."""
    setattr(host, PATH, path)
    host.__class__ = laddered(type(host))
    rebind(host)


def leave(host: Any) -> None:
    """Undo `enter`; where a class was put around it, such as FSDP2's, that goes on without a ladder."""
    delattr(host, PATH)
    if "plain" in vars(type(host)):
        host.__class__ = type(host).plain
    rebind(host)


def rebind(host: Any) -> None:
    """Have the hooks of accelerate call the forward of the class that the backbone has now."""
    if "_old_forward" in vars(host):
        host._old_forward = types.MethodType(type(host).forward, host)
