"""What sparse differences of parameters change in the output of a module."""

import copy
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

# Products with more than 1 / DENSE of the entries are dense.
DENSE = 50
CHUNK = 2**22  # numbers in a buffer for the gradients of fewer entries


class SparseProduct(torch.autograd.Function):
    """y = S x, where S: (d_out, d_in) has `values` at (rows, columns) and is zero elsewhere.

    The gradient of an entry is sum_n g[n, row] x[n, column]. It is computed at the entries alone. Where more than
    1 / DENSE of the entries are trained, S and the gradient of the whole weight are made, for the length of a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # shape: (n, d_in)
        values: Tensor,  # shape: (k,)
        rows: Tensor,  # shape: (k,)
        columns: Tensor,  # shape: (k,)
        d_out: int,
    ) -> Tensor:  # shape: (n, d_out), in the type of `values`
        ctx.save_for_backward(x, values, rows, columns)
        return times(values, rows, columns, d_out, x.to(values.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, values, rows, columns = ctx.saved_tensors
        g = gradients[0].to(values.dtype)  # (n, d_out)
        of_x = times(values, columns, rows, x.shape[1], g).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_values = entries(g, x.to(values.dtype), rows, columns) if ctx.needs_input_grad[1] else None
        return of_x, of_values, None, None, None


def times(values: Tensor, rows: Tensor, columns: Tensor, d_out: int, x: Tensor) -> Tensor:  # shape: (n, d_out)
    """S x."""
    with torch.autocast(x.device.type, enabled=False):
        place, shape = torch.stack([rows, columns]), (d_out, x.shape[1])
        if is_dense(rows, *shape):
            return x @ values.new_zeros(shape).index_put((rows, columns), values, accumulate=True).T
        matrix = torch.sparse_coo_tensor(place, values, shape, check_invariants=False)
        return torch.sparse.mm(matrix, x.T).T


def is_dense(rows: Tensor, d_out: int, d_in: int) -> bool:
    """Whether so many entries of a matrix are trained that a dense product is faster."""
    return len(rows) * DENSE > d_out * d_in


def entries(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:  # shape: (k,)
    """The entries (rows, columns) of g^T x,  g: (n, d_out), x: (n, d_in)."""
    with torch.autocast(x.device.type, enabled=False):
        if is_dense(rows, g.shape[1], x.shape[1]):
            return (g.T @ x)[rows, columns]
        g, x = g.T.contiguous(), x.T.contiguous()
        size = max(1, CHUNK // max(1, g.shape[1]))
        pairs = zip(rows.split(size), columns.split(size), strict=True)
        return torch.cat([(g[row] * x[column]).sum(dim=1) for row, column in pairs])


def linear_delta(
    module: nn.Module,
    x: Tensor,  # shape: (*batch, d_in)
    values: Tensor,  # shape: (k,)
    index: Tensor,  # shape: (k,), in the flattened weight
    shape: torch.Size,
) -> Tensor:  # shape: (*batch, d_out)
    """What differences of the weight of a linear leaf add to its output."""
    rows, columns = index // shape[1], index % shape[1]
    d_out = shape[0]
    if isinstance(module, Conv1D):
        rows, columns, d_out = columns, rows, shape[1]
    y: Any = SparseProduct.apply(x.reshape(-1, x.shape[-1]), values, rows, columns, d_out)
    return y.view(*x.shape[:-1], d_out)


def embedding_delta(
    ids: Tensor,  # shape: (*batch)
    values: Tensor,  # shape: (k,)
    index: Tensor,  # shape: (k,), in the flattened weight
    d: int,
) -> Tensor:  # shape: (*batch, d)
    """What differences of the weight of an embedding add to its output; rows outside the batch are not computed."""
    used, place = ids.unique(return_inverse=True)
    rows = index // d
    position = torch.searchsorted(used, rows).clamp(max=len(used) - 1)
    hit = used[position] == rows
    table = values.new_zeros(len(used), d)
    table = table.index_put((position[hit], index[hit] % d), values[hit], accumulate=True)
    return table[place]


def dense(values: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """The differences as a tensor of this shape, zero where there are none."""
    return values.new_zeros(shape.numel()).index_add(0, index, values).view(shape)


def with_deltas(module: nn.Module, deltas: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a module whose parameters have these differences added, computed in the wider of both types.

    A shallow copy of the module runs, so that threads can share the module.
    """
    dtype = reduce(torch.promote_types, (delta.dtype for delta in deltas.values()))

    def wide(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.promote_types(value.dtype, dtype)) if is_float else value

    twin = copy.copy(module)
    own = {name: wide(p) for name, p in module._parameters.items()}
    vars(twin)["_parameters"] = own | {name: own[name] + delta for name, delta in deltas.items()}
    return type(module).forward(twin, *tree_map(wide, args), **tree_map(wide, kwargs))
