"""The forward of a backbone with a ladder: how it reaches the ladder, and the outputs that its blocks record.

A forward keeps nothing on a module: threads may share one model, and copies of modules share their attributes.
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

PATH = "_ladder_path"  # attribute of a backbone: the path of its ladder


@dataclass
class Steps:
    """The outputs of one forward of a backbone that its side network reads.

    Args:
        embed: the backbone's embeddings of tokens.
        side_blocks: block of the backbone -> the side block that reads its output.
        deferred: whether the side blocks cannot compute yet, because their weights are sharded.
        grad: whether gradients are enabled outside the backbone.
        images: place of a side block -> the block's output, projected to the side network's width.
        states: place of a side block -> the block's output itself.
    """

    embed: nn.Module | None = None
    side_blocks: dict[nn.Module, Any] = field(default_factory=dict)
    deferred: bool = False
    grad: bool = field(default_factory=torch.is_grad_enabled)
    images: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)

    def record(self, block: nn.Module, output: Any) -> None:
        """Keep the output of a block with a side block: projected, or whole if weights are sharded."""
        side_block = self.side_blocks.get(block)
        if side_block is None:
            return
        b = output[0] if isinstance(output, tuple) else output  # (batch, length, d)
        if self.deferred:
            self.states[side_block.place] = b
        else:
            with torch.set_grad_enabled(self.grad):
                self.images[side_block.place] = side_block.image(b)


RUNNING: ContextVar[Steps | None] = ContextVar("steps", default=None)


@contextmanager
def running(steps: Steps) -> Iterator[None]:
    """Make `steps` those of this thread's forward, within the context."""
    token = RUNNING.set(steps)
    try:
        yield
    finally:
        RUNNING.reset(token)


def running_steps() -> Steps:
    """The steps of this thread's forward."""
    steps = RUNNING.get()
    assert steps is not None, "a side network runs beside its backbone only"
    return steps


def record_output(block: nn.Module, args: Any, output: Any) -> None:
    """The hook on each block of a backbone. It is bound to no ladder, so that it works on copies of the block too."""
    steps = RUNNING.get()
    if steps is not None:
        steps.record(block, output)


@contextmanager
def not_checkpointed(host: nn.Module, blocks: nn.ModuleList) -> Iterator[None]:
    """Switch gradient checkpointing off in a backbone, within the context: it runs without gradients."""
    module: Any
    checkpointed = [m for m in (host, *blocks) if m.training and getattr(m, "gradient_checkpointing", False)]
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


@functools.cache
def laddered(kind: type) -> type:
    """The class of a backbone with a ladder, a subclass made at run time as torch's parametrize and FSDP2 do.

    `forward` runs the ladder, whether the module or its `forward` is called. The rest is inherited.
    """

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(kind.forward, self)
        path = vars(self).get(PATH)
        return plain(*args, **kwargs) if path is None else self.get_submodule(path).run(self, plain, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        make, (_, *rest), *state = cast(Any, kind).__reduce_ex__(self, protocol)  # pickle finds classes by their names
        return (rebuild, (make, kind, *rest), *state)

    own = {"forward": forward, "__reduce_ex__": reduce, "plain": kind}
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**own, **named})


def rebuild(make: Callable[..., Any], kind: type, *rest: Any) -> Any:
    """An empty backbone with a ladder, for copying and unpickling."""
    return make(laddered(kind), *rest)


def check_forward(host: nn.Module) -> None:
    """Refuse a backbone whose forward was replaced on the object. accelerate's hooks keep the original.

    Raises:
        ValueError: the forward was replaced.
    """
    replaced = "forward" in vars(host) and "_old_forward" not in vars(host)
    rule = "must have the forward of its class, which a ladder extends; put the ladder in first"
    check("model", type(host).__name__, not replaced, rule)


def enter(host: Any, path: str) -> None:
    """Let the forward of a backbone run the ladder at `path`."""
    setattr(host, PATH, path)
    host.__class__ = laddered(type(host))
    rebind(host)


def leave(host: Any) -> None:
    """Undo `enter`. A class that was put around it since, such as FSDP2's, stays and runs no ladder."""
    delattr(host, PATH)
    if "plain" in vars(type(host)):
        host.__class__ = type(host).plain
    rebind(host)


def rebind(host: Any) -> None:
    """Let accelerate's hooks call the forward of the backbone's present class."""
    if "_old_forward" in vars(host):
        host._old_forward = types.MethodType(type(host).forward, host)
