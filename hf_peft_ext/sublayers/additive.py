"""What the low-rank and the bottleneck sub-layer share: a narrow code of the input, and a matrix that widens it."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.sublayers.gate import Gate


class Additive(nn.Module, ABC):
    """y + W z(x): a sub-layer adds its widened code z to an output y.

    `forward` is the formula of the sub-layer. `add` is the same sum with fewer passes over memory: x is read once for
    the sub-layer and its gate, the gate scales the narrow code, and the widened code is added into y.
    """

    gate: Gate | None

    @abstractmethod
    def code(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        visible: Tensor | None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor]:  # shapes: (*batch, r), (d_out, r)
        """The gated code z of x, and the matrix that widens it."""

    def add(
        self,
        y: Tensor,  # shape: (*batch, d_out)
        x: Tensor,  # shape: (*batch, d_in)
        visible: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d_out)
        """y + forward(x), in one pass over y where the types allow it."""
        z, up = self.code(x, visible)
        if y.dtype != z.dtype or y.dtype != up.dtype or torch.is_autocast_enabled(y.device.type):
            return y + F.linear(z, up).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), up.t()).view_as(y)

    def project(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        weight: Tensor,  # shape: (r, d_in)
        visible: Tensor | None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor | None]:  # shapes: (*batch, r), gate
        """x times the weight, and the gate of x, both from one product."""
        x = cast(x, weight)
        if self.gate is None:
            return F.linear(x, weight), None
        product = F.linear(x, torch.cat([weight, self.gate.weight]))
        return product[..., :-1], self.gate(product[..., -1:], visible)


def gate_of(
    gate: Gate | None,
    x: Tensor,  # shape: (*batch, d)
    visible: Tensor | None,  # shape: (batch, length)
) -> Tensor | float:
    """g(x), or 1 without a gate."""
    return 1.0 if gate is None else gate(F.linear(cast(x, gate.weight), gate.weight), visible)


def cast(x: Tensor, weight: Tensor) -> Tensor:
    """x in the type of the weight that reads it; autocast does that by itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
