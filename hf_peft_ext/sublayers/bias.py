"""A bias that is trained while everything else is frozen."""

import torch
from torch import Tensor, nn


class Bias(nn.Module):
    """y + b,  b: (d,), zero at the start.

    BitFit, Ben Zaken et al. 2022 (https://arxiv.org/abs/2106.10199). Where the base module has a bias b_0, the trained
    bias of the paper is b_0 + b: the same function and the same gradient, while the base model stays untouched. Where
    it has none, b is a new bias that starts at zero.

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
        token_mask: Tensor | None = None,
    ) -> Tensor:  # shape: (d,)
        """b."""
        return self.b

    def add(
        self,
        y: Tensor,  # shape: (*batch, d)
        x: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:  # shape: (*batch, d)
        """y + b."""
        return y + self.b.to(y.dtype)
