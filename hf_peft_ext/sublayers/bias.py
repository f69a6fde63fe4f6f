"""A bias that is trained while everything else is frozen."""

import torch
from torch import Tensor, nn


class Bias(nn.Module):
    """y + b,  b: (d,), zero at the start.

    BitFit, Ben Zaken et al. 2022 (https://arxiv.org/abs/2106.10199). Where the base module has a bias b_0, the trained
    bias of the paper is b_0 + b: the same function and the same gradient, while the base model stays untouched. Where
    it has none, b is the zero-initialised bias that is added to it.

    Args:
        d: width of y.
    """

    gate = None

    def __init__(self, d: int):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(d))

    def forward(
        self,
        x: Tensor | None = None,  # unused: a bias reads nothing
        visible: Tensor | None = None,
    ) -> Tensor:  # shape: (d,)
        return self.b

    def add(
        self,
        y: Tensor,  # shape: (*batch, d)
        x: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:  # shape: (*batch, d)
        return y + self.b.to(y.dtype)
