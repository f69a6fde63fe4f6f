"""A tensor of an adapter that is computed, each time it is asked for, from another one through projections.

What torch.nn.utils.parametrize does, which cannot take a tensor that follows another model's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_peft_ext.transfer.map.adapter_tensors import SEEN, Part
from hf_peft_ext.validation.checks import check


class Block(NamedTuple):
    """Some rows of a dimension and what projects them; None for all rows."""

    projection: nn.Module
    rows_from: Tensor | None
    rows_to: Tensor | None


class Step(NamedTuple):
    """A dimension that is projected, and its size afterwards; None for heads x d of (heads, n, d)."""

    dim: int | None
    size: int
    blocks: list[Block]


class Seen(nn.Module):
    """The tensor that the steps make, one after the other: of a copy of its own, or of a tensor of another model.

    Args:
        shape: of the result.
        source: what it is made of.
        steps: the projections.
        follows: whether `source` itself is read each time, and trained with it, in place of a copy.
    """

    def __init__(self, shape: torch.Size, source: Part, steps: list[Step], follows: bool):
        super().__init__()
        self.shape, self.steps, self.name = shape, steps, source.name
        self.projections = nn.ModuleList(block.projection for step in steps for block in step.blocks)
        self.original = None if follows else nn.Parameter(source.value.detach().clone())
        self.owner = source.owner if follows else None  # a child, so that its parameters are this one's too

    def forward(self) -> Tensor:
        x: Any = self.original if self.owner is None else getattr(self.owner, self.name)
        for step in self.steps:
            x = project(x, step) if step.dim is not None else project_heads(x, self.shape, step)
        return x


def project(x: Tensor, step: Step) -> Tensor:
    """A dimension of x, block by block of its rows."""
    dim: Any = step.dim
    x = x.movedim(dim, -1)
    if len(step.blocks) == 1 and step.blocks[0].rows_to is None:
        y = through(step.blocks[0], x)
    else:
        y = x.new_zeros(*x.shape[:-1], step.size)
        for block in step.blocks:
            rows: Any = block.rows_to
            y = y.index_copy(-1, rows.to(y.device), through(block, x))
    return y.movedim(-1, dim)


def project_heads(x: Tensor, shape: torch.Size, step: Step) -> Tensor:
    """(heads, n, d) along heads x d."""
    heads, n, d = shape
    flat = through(step.blocks[0], x.transpose(0, 1).flatten(1))  # shape: (n, heads d)
    return flat.view(n, heads, d).transpose(0, 1)


def through(block: Block, x: Tensor) -> Tensor:
    return block.projection(x if block.rows_from is None else x[..., block.rows_from])


def parametrize(part: Part, source: Part, steps: list[Step], follows: bool = False) -> None:
    """Put in the place of a tensor what the steps make of another one.

    Raises:
        ValueError: that has not the shape which belongs there.
    """
    owner, name, shape = part.owner, part.name, part.value.shape
    # in a model without weights a tensor is where it comes from
    device = source.value.device if part.value.is_meta else part.value.device
    seen = Seen(shape, source, steps, follows).to(device)
    found = seen().shape
    rule = f"becomes {tuple(found)}, where {tuple(shape)} belongs"
    check(part.tensor, tuple(source.value.shape), found == shape, rule)
    if not isinstance(owner, Computed):
        kind = type(owner)
        owner.__class__ = type(kind.__name__, (Computed, kind), {"__module__": kind.__module__})
    delattr(owner, name)
    owner.add_module(SEEN + name, seen)
    setattr(type(owner), name, property(lambda self: self._modules[SEEN + name]()))


class Computed:
    """Marks the class of a module that has tensors of this kind. Each such module has a class of its own."""


def remove_parametrization(owner: Any) -> None:
    """Make parameters of a module's computed tensors."""
    names = [name.removeprefix(SEEN) for name, child in owner.named_children() if isinstance(child, Seen)]
    values = {name: getattr(owner, name).detach().clone() for name in names}
    owner.__class__ = type(owner).__bases__[1]
    for name, value in values.items():
        delattr(owner, SEEN + name)
        owner.register_parameter(name, nn.Parameter(value))
