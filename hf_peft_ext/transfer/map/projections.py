"""The linear projections that carry an adapter from one width to another, and its layers from one depth to another.

W_plug (small -> large) and W_down (large -> bridge) of "Parameter-efficient Tuning for Large Language Model without
Calculating Its Gradients" (EMNLP 2023, section 2). The paper leaves open which sides of a module get them and how they
are initialised; `Projections` has an argument for each.
"""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.validation.checks import check, check_count

Side = Literal["in", "out"]
Init = Literal["orthogonal", "slice", "least_squares"]
Order = Literal["interleaved", "tiled"]
Space = tuple[str, int | None]  # "residual" and None, or a space inside a layer ("query", "ffn") and the layer


class Dense(nn.Module):
    """y = W x,  W: (d_to, d_from), with orthonormal columns (or rows, where they are fewer) at the start."""

    def __init__(self, d_from: int, d_to: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(d_to, d_from)))

    def forward(
        self,
        x: Tensor,  # shape: (*, d_from)
    ) -> Tensor:  # shape: (*, d_to)
        return F.linear(x, self.weight.to(x.dtype))


class Slice(nn.Module):
    """y = x[index], or, if y is wider, y[index] = x and 0 elsewhere.

    Args:
        d_from, d_to: widths of x and y.
        index: the channels of the wider one that the narrower one has; None for the first.

    Raises:
        ValueError: `index` has another length than the narrower one.
    """

    index: Tensor

    def __init__(self, d_from: int, d_to: int, index: Tensor | None = None):
        super().__init__()
        index = torch.arange(min(d_from, d_to)) if index is None else index
        rule = f"must hold {min(d_from, d_to)} channels out of {max(d_from, d_to)}"
        check("index", len(index), len(index) == min(d_from, d_to), rule)
        self.d_to, self.widens = d_to, d_to >= d_from
        self.register_buffer("index", index, persistent=False)

    def forward(
        self,
        x: Tensor,  # shape: (*, d_from)
    ) -> Tensor:  # shape: (*, d_to)
        if not self.widens:
            return x.index_select(-1, self.index)
        return x.new_zeros(*x.shape[:-1], self.d_to).index_copy(-1, self.index, x)


class Projections(nn.Module):
    """One projection for each side of each space.

    The residual stream is one space through all layers. The channels inside a layer (of its queries, of its FFN) are
    spaces of that layer. The input of LoRA's A is the residual stream (side "in"),
    the output of its B are, for example, queries (side "out"). From small to large, W projects inputs by
    x_small = W^T x_large and outputs by x_large = W x_small. With orthonormal columns and the same W on both sides the
    result is the small model's delta: (W B)(A W^T) (W x) = W B A x.

    Args:
        init: "orthogonal" (random, the same on both sides), "slice" (the small model's channels are channels of
            the large one: those of `index`, or the first) or "least_squares" (fitted to states of both models on the
            batches of `plug`; in a first trial a good fit of states did not make a useful adapter).
        sides: which sides have this projection: "both", "in" or "out"; the other one is a slice.
        trainable: whether the projections are trained with the adapter.
        index: for slices, space -> the channels of the wider model that the narrower one has.

    Raises:
        ValueError: `init` or `sides` is not one of these.
    """

    def __init__(
        self,
        init: Init = "orthogonal",
        sides: Literal["both", "in", "out"] = "both",
        trainable: bool = True,
        index: Mapping[Space, Tensor] | None = None,
    ):
        super().__init__()
        check("init", init, init in get_args(Init), f"must be one of {', '.join(get_args(Init))}")
        check("sides", sides, sides in ("both", "in", "out"), "must be one of both, in, out")
        self.init, self.sides, self.trainable, self.index = init, sides, trainable, index or {}
        self.of = nn.ModuleDict()

    def between(self, space: Space, side: Side, d_from: int, d_to: int) -> nn.Module:
        """The projection of a side of a space, built by the first call."""
        name = key_of(space, side)
        if name not in self.of:
            self.of[name] = self._build(space, side, d_from, d_to)
        return self.of[name]

    def _build(self, space: Space, side: Side, d_from: int, d_to: int) -> nn.Module:
        if self.init == "slice" or self.sides not in ("both", side):
            return Slice(d_from, d_to, self.index.get(space))
        dense = Dense(d_from, d_to)
        other = key_of(space, "out" if side == "in" else "in")
        if isinstance(twin := self.of[other] if other in self.of else None, Dense):
            dense.weight.data.copy_(twin.weight)
        return dense.requires_grad_(self.trainable)


def key_of(space: Space, side: Side) -> str:
    """The name of a side of a space in `Projections.of`."""
    name, layer = space
    return f"{name}_{side}" if layer is None else f"{name}_{layer}_{side}"


def least_squares(
    x: Tensor,  # shape: (tokens, d_from)
    y: Tensor,  # shape: (tokens, d_to)
    ridge: float = 1e-2,
) -> Tensor:  # shape: (d_to, d_from)
    """W = C_yx (C_xx + lambda I)^-1 on centred x and y: ridge regression of y on x.

    Args:
        ridge: lambda, as a share of the mean variance of x.
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    c_xx, c_yx = x.T @ x, y.T @ x
    weight = ridge * c_xx.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(c_xx + weight * torch.eye(len(c_xx), dtype=x.dtype, device=x.device), c_yx.T).T


def layer_map(small: list[int], large: list[int], order: Order = "interleaved") -> list[int]:
    """The small model's layer for each layer of the large one.

    Stack by stack, encoder before decoder. Interleaved, layer i of n takes floor(i n_small / n), so neighbours share a
    layer; tiled, it takes i mod n_small. Any ratio of depths is possible.

    Args:
        small, large: the depth of each stack.

    Raises:
        ValueError: the models have different numbers of stacks, or `order` is unknown.
    """
    check("order", order, order in get_args(Order), f"must be one of {', '.join(get_args(Order))}")
    rule = f"must have as many stacks of layers as the large model, {len(large)}"
    check("small", small, len(small) == len(large), rule)
    layers: list[int] = []
    for first, (n_small, n_large) in zip(first_layers(small), zip(small, large, strict=True), strict=True):
        check_count("depth", n_small)
        source: Callable[[int], int] = (
            (lambda i, n=n_small, m=n_large: i * n // m) if order == "interleaved" else (lambda i, n=n_small: i % n)
        )
        layers += [first + source(i) for i in range(n_large)]
    return layers


def first_layers(depths: list[int]) -> list[int]:
    """The index of the first layer of each stack."""
    return [sum(depths[:i]) for i in range(len(depths))]
