"""Tensors of an adapter that are computed from other tensors through projections, by `torch.nn.utils.parametrize`."""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensor
from hf_peft_ext.validation.checks import check


class Block(NamedTuple):
    """A projection of some rows of a dimension to some rows; None for all rows."""

    projection: nn.Module
    rows_from: Tensor | None
    rows_to: Tensor | None

    def project(self, x: Tensor) -> Tensor:
        """The projection of its rows of the last dimension of x."""
        return self.projection(x if self.rows_from is None else x[..., self.rows_from])


class Step(NamedTuple):
    """The projection of one dimension, to `size`; None for the heads of a prefix, (heads, n, d) along heads x d."""

    dim: int | None
    size: int
    blocks: list[Block]

    def project(self, x: Tensor, heads: int) -> Tensor:
        """The tensor with this dimension projected, block by block of its rows."""
        if self.dim is None:
            flat = self.blocks[0].project(x.transpose(0, 1).flatten(1))  # shape: (n, heads d)
            return flat.unflatten(1, (heads, -1)).transpose(0, 1)
        x = x.movedim(self.dim, -1)
        if len(self.blocks) == 1 and self.blocks[0].rows_to is None:
            y = self.blocks[0].project(x)
        else:
            y = x.new_zeros(*x.shape[:-1], self.size)
            for block in self.blocks:
                rows: Any = block.rows_to
                y = y.index_copy(-1, rows.to(y.device), block.project(x))
        return y.movedim(-1, self.dim)


class Projected(nn.Module):
    """P_n ... P_1 x, x being the parametrized tensor's original; computed in the wider type, returned in that of x.

    Args:
        steps: the projections of its dimensions, one after the other.
        heads: of the result, if it is a prefix.
    """

    def __init__(self, steps: list[Step], heads: int):
        super().__init__()
        self.steps, self.heads = steps, heads
        self.projections = nn.ModuleList(block.projection for step in steps for block in step.blocks)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(reduce(torch.promote_types, (p.dtype for p in self.projections.parameters()), x.dtype))
        for step in self.steps:
            y = step.project(y, self.heads)
        return y.to(x.dtype)


class Followed(Projected):
    """P_n ... P_1 x, x being a tensor of another model, which is read each time and trained with this model.

    Args:
        source: that tensor. Its owner becomes a child, so its parameters belong to this model too.
    """

    def __init__(self, steps: list[Step], heads: int, source: AdapterTensor):
        super().__init__(steps, heads)
        self.owner, self.name = source.owner, source.name

    def right_inverse(self, value: Tensor) -> tuple[()]:
        """There is no original: each forward reads the source."""
        return ()

    def forward(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(getattr(self.owner, self.name))


def parametrize(target: AdapterTensor, source: AdapterTensor, steps: list[Step], follow: bool = False) -> None:
    """Replace a parameter by a tensor computed from `source` through `steps`.

    Args:
        follow: whether `source` itself is read each time and trained; otherwise a copy of it, in the target's type.

    Raises:
        ValueError: the result has another shape than the target.
    """
    owner, name, value = target.owner, target.name, target.value
    device = source.value.device if value.is_meta else value.device  # a model on the meta device has no weights
    heads = value.shape[0]
    computed = (Followed(steps, heads, source) if follow else Projected(steps, heads)).to(device)
    shape = (computed() if follow else computed(source.value.detach().to(device))).shape
    rule = f"has shape {tuple(shape)} after projection, expected {tuple(value.shape)}"
    check(target.tensor, tuple(source.value.shape), shape == value.shape, rule)
    if not follow:
        owner.register_parameter(name, nn.Parameter(source.value.detach().clone().to(device, value.dtype)))
    register_parametrization(owner, name, computed, unsafe=True)  # the shape differs from the original's


def is_projected(module: nn.Module) -> bool:
    """Whether `parametrize` has replaced a tensor of a module."""
    lists: Any = module._modules.get("parametrizations", {})  # peft's wrappers give attributes of the module inside
    return any(isinstance(lists[name][0], Projected) for name in lists)


def remove_parametrization(owner: Any) -> None:
    """Replace a module's computed tensors by trainable parameters with the same values."""
    # a deep copy shares its class with the module that it was copied from, and torch deletes properties of the class
    owner.__class__ = type(type(owner).__name__, type(owner).__bases__, dict(vars(type(owner))))
    for name in list(owner.parametrizations):
        remove_parametrizations(owner, name)
        getattr(owner, name).requires_grad_(True)
