"""What the low-rank and the bottleneck sub-layer share: a narrow code of the input, and a matrix that widens it."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gate import Gate


class Additive(nn.Module, ABC):
    """y + up z(x): a sub-layer adds its widened code to an output y.

    A gate is applied to the narrow code, not to the wide output, and reads x in the same product as the code does.
    """

    gate: Gate | None

    @abstractmethod
    def code(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        visible: Tensor | None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor]:  # shapes: (*batch, r), (d_out, r)
        """The gated code z of x, and the matrix that widens it."""

    def forward(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        visible: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d_out)
        z, up = self.code(x, visible)
        return F.linear(z, up)

    def add(
        self,
        y: Tensor,  # shape: (*batch, d_out)
        x: Tensor,  # shape: (*batch, d_in)
        visible: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d_out)
        """y + forward(x), in one pass over y where the types allow it."""
        z, up = self.code(x, visible)
        if y.dtype == z.dtype == up.dtype and not torch.is_autocast_enabled(y.device.type):
            return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), up.t()).view_as(y)
        return y + F.linear(z, up).to(y.dtype)

    def read(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        down: Tensor,  # shape: (r, d_in)
        visible: Tensor | None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor | None]:  # shapes: (*batch, r), gate
        """`down x` and the gate of x, as one matrix product."""
        x = cast(x, down)
        if self.gate is None:
            return F.linear(x, down), None
        z, score = F.linear(x, torch.cat([down, self.gate.weight])).split([len(down), 1], dim=-1)
        return z, self.gate(score, visible)


def cast(x: Tensor, weight: Tensor) -> Tensor:
    """x in the type of the weight that reads it; autocast does that by itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
