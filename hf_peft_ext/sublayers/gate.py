"""Gates, and the base of the gated sub-layers: one matrix product reads x for a sub-layer and for its gate."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["mean", "mean_padded", "token"]


class Gate(nn.Module):
    """g(x) = sigmoid(w x + b), one for each token, or their mean over the tokens of an example.

    UniPELT, Mao et al. 2022 (https://arxiv.org/abs/2110.07577), section 3.2. The paper takes the mean, padding
    included; here padding is left out. `"token"` keeps one gate for each token: where attention is causal, a mean
    would let a token see the tokens after it.

    Args:
        d: width of x.
        pooling: `"mean"`, `"mean_padded"` (padding included, as in the paper's code and AdapterHub's) or `"token"`.
        init: b at the start. 2 opens a gate to about 0.88; the paper's 0 to 0.5.
    """

    def __init__(self, d: int, pooling: Pooling = "mean", init: float = 2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, d))
        self.bias = nn.Parameter(torch.full((1,), float(init)))
        self.pooling = pooling
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self,
        score: Tensor,  # shape: (batch, length, 1): w x, computed together with the sub-layer's own product
        token_mask: Tensor | None = None,  # shape: (batch, keys): False at padding; the tokens of x are the last ones
    ) -> Tensor:  # shape: (batch, 1, 1) for a mean, (batch, length, 1) for tokens
        """g(x), from w x.

        Raises:
            ValueError: a mean is to be taken over inputs that are no (batch, length, d), or with a mask that is no
                tensor.
        """
        g = torch.sigmoid(score + self.bias)
        if self.pooling == "token":
            return g
        if score.ndim != 3:
            raise ValueError(
                f"`gate_pooling` (={self.pooling!r}) needs hidden states of shape (batch, length, d), this module "
                f"reads {score.ndim} dimensions; use gate_pooling='token'."
            )
        if token_mask is None or self.pooling == "mean_padded":
            return g.mean(1, keepdim=True)
        if not isinstance(token_mask, Tensor):
            kind = type(token_mask).__name__
            raise ValueError(f"`gate_pooling` (='mean') cannot read a mask of type {kind}; use sdpa or eager.")
        weight = token_mask[:, -g.shape[1] :, None].to(g.dtype)  # (batch, length, 1)
        return (g * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)

    @property
    def is_constant(self) -> bool:
        """Whether the gate no longer depends on its input (see `fix_gates`)."""
        return not self.weight.any().item()

    def fix(self, value: float) -> None:
        """Make the gate the constant `value` (between 0 and 1): w = 0, b = logit(value)."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.fill_(torch.logit(torch.tensor(value), eps=1e-6).item())

    def extra_repr(self) -> str:
        return f"d={self.weight.shape[1]}, pooling={self.pooling!r}"


class Additive(nn.Module, ABC):
    """y + W z(x): a sub-layer adds its gated code z, widened by W, to an output y.

    `forward` is the formula of the sub-layer. `add` is the same sum with fewer passes over memory: x is read once for
    the sub-layer and its gate, the gate scales the narrow code, and the widened code is added into y.
    """

    gate: Gate | None

    @abstractmethod
    def code(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        token_mask: Tensor | None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor]:  # shapes: (*batch, r), (d_out, r)
        """The gated code z of x, and the matrix W."""

    def add(
        self,
        y: Tensor,  # shape: (*batch, d_out)
        x: Tensor,  # shape: (*batch, d_in)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d_out)
        """y + forward(x), in one pass over y where the types allow it."""
        z, up = self.code(x, token_mask)
        if y.dtype != z.dtype or y.dtype != up.dtype or torch.is_autocast_enabled(y.device.type):
            return y + F.linear(z, up).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), up.t()).view_as(y)

    def project(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        weight: Tensor,  # shape: (r, d_in)
        token_mask: Tensor | None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor | None]:  # shapes: (*batch, r), (batch, length or 1, 1)
        """W x and g(x), both from one product; None for g without a gate."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        if self.gate is None:
            return F.linear(x, weight), None
        product = F.linear(x, torch.cat([weight, self.gate.weight]))  # (*batch, r + 1)
        return product[..., :-1], self.gate(product[..., -1:], token_mask)


def gate_factor(
    gate: Gate | None,
    x: Tensor,  # shape: (*batch, d)
    token_mask: Tensor | None,  # shape: (batch, length)
) -> Tensor | float:  # shape: (batch, length or 1, 1)
    """g(x), or 1 without a gate."""
    return 1.0 if gate is None else gate(F.linear(cast(x, gate.weight), gate.weight), token_mask)


def cast(x: Tensor, weight: Tensor) -> Tensor:
    """x in the type of the weight that reads it; autocast does that by itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
