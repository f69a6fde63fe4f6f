"""A gate decides, from its input, how much of a sub-layer is let through."""

from typing import Literal

import torch
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
    """

    def __init__(self, d: int, pooling: Pooling = "mean"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, d))
        self.bias = nn.Parameter(torch.zeros(1))
        self.pooling = pooling
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self,
        score: Tensor,  # shape: (batch, length, 1): w x, taken together with whatever else reads x
        visible: Tensor | None = None,  # shape: (batch, keys): False at padding; the tokens of x are the last ones
    ) -> Tensor:  # shape: (batch, 1, 1) for the mean, (batch, length, 1) for tokens
        g = torch.sigmoid(score + self.bias)
        if self.pooling == "token":
            return g
        if score.ndim != 3:
            raise ValueError(
                f"`gate_pooling` (={self.pooling!r}) needs hidden states of shape (batch, length, d), this module "
                f"reads {score.ndim} dimensions; use gate_pooling='token'."
            )
        if visible is None or self.pooling == "mean_padded":
            return g.mean(1, keepdim=True)
        weight = visible[:, -g.shape[1] :, None].to(g.dtype)
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
