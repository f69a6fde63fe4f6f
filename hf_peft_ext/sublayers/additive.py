"""What the low-rank and the bottleneck sub-layer share: a narrow code of the input, and a matrix that widens it."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gate import Gate


class Additive(nn.Module, ABC):
    """y + up z(x): a sub-layer adds its widened code to an output y.

    A gate is applied to the narrow code, not to the wide output. All that is multiplied with x stands in `rows_in`, so
    that x is read once, even for several sub-layers that read the same x (`tuners.reader`).
    """

    gate: Gate | None

    @property
    @abstractmethod
    def rows_in(self) -> list[Tensor]:  # shapes: (r, d_in), (1, d_in)
        """What x is multiplied with, the gate's row last."""

    @property
    def reads_plain(self) -> bool:
        """Whether x is read as it is, without dropout."""
        return True

    @abstractmethod
    def code(
        self,
        product: Tensor,  # shape: (*batch, k)
        visible: Tensor | None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor]:  # shapes: (*batch, r), (d_out, r)
        """The gated code z of x, from its product with `rows_in`, and the matrix that widens it."""

    def read(
        self,
        x: Tensor,  # shape: (*batch, d_in)
    ) -> Tensor:  # shape: (*batch, k)
        return product(x, self.rows_in)

    def forward(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        visible: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d_out)
        z, up = self.code(self.read(x), visible)
        return F.linear(z, up)

    def add(
        self,
        y: Tensor,  # shape: (*batch, d_out)
        product: Tensor,  # shape: (*batch, k)
        visible: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d_out)
        """y + forward(x), in one pass over y where the types allow it."""
        z, up = self.code(product, visible)
        if y.dtype != z.dtype or y.dtype != up.dtype or torch.is_autocast_enabled(y.device.type):
            return y + F.linear(z, up).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), up.t()).view_as(y)

    def gated(
        self,
        product: Tensor,  # shape: (*batch, k)
        visible: Tensor | None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor | None]:  # shapes: (*batch, r), gate
        """The product without the gate's column, and the gate."""
        if self.gate is None:
            return product, None
        return product[..., :-1], self.gate(product[..., -1:], visible)


def product(
    x: Tensor,  # shape: (*batch, d_in)
    rows: list[Tensor],  # shapes: (k_i, d_in)
) -> Tensor:  # shape: (*batch, sum of k_i)
    """x with all the rows, read once."""
    weight = rows[0] if len(rows) == 1 else torch.cat(rows)
    return F.linear(cast(x, weight), weight)


def with_gate(rows: Tensor, gate: Gate | None) -> list[Tensor]:
    return [rows] if gate is None else [rows, gate.weight]


def cast(x: Tensor, weight: Tensor) -> Tensor:
    """x in the type of the weight that reads it; autocast does that by itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
