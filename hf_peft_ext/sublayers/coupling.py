"""An invertible change of the embeddings."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_peft_ext.sublayers.gate import cast


class Coupling(nn.Module):
    """h(x) = [y_1, y_2],  y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1), with x = [x_1, x_2] and two small networks F and G.

    NICE, Dinh et al. 2015 (https://arxiv.org/abs/1410.8516), as the invertible adapter of MAD-X, Pfeiffer et al. 2020
    (https://arxiv.org/abs/2005.00052), section 3.2. Both networks start at zero, so that h(x) = x.

    Args:
        d: width of x.
        reduction_factor: the networks are 1 / reduction_factor as wide as what they read.
        activation: a name in transformers' `ACT2FN`.
    """

    gate = None

    def __init__(self, d: int, reduction_factor: float = 2.0, activation: str = "relu"):
        super().__init__()
        d_1, d_2 = self.sizes = d // 2, d - d // 2
        self.first = network(d_2, d_1, reduction_factor, activation)  # F
        self.second = network(d_1, d_2, reduction_factor, activation)  # G

    def forward(
        self,
        x: Tensor,  # shape: (*batch, d)
    ) -> Tensor:  # shape: (*batch, d)
        """h(x)."""
        x_1, x_2 = cast(x, self.first.get_parameter("0.weight")).split(self.sizes, dim=-1)
        y_1 = x_1 + self.first(x_2)
        return torch.cat([y_1, x_2 + self.second(y_1)], dim=-1)

    def inverse(
        self,
        y: Tensor,  # shape: (*batch, d)
    ) -> Tensor:  # shape: (*batch, d)
        """x with h(x) = y."""
        y_1, y_2 = cast(y, self.first.get_parameter("0.weight")).split(self.sizes, dim=-1)
        x_2 = y_2 - self.second(y_1)
        return torch.cat([y_1 - self.first(x_2), x_2], dim=-1)

    def add(
        self,
        y: Tensor,  # shape: (*batch, d)
        x: Tensor,  # shape: (*batch, d), the same
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d)
        """y + h(x) - x, which is h(y): the site of this sub-layer has x = y."""
        return self(y).to(y.dtype)


def network(d_in: int, d_out: int, reduction_factor: float, activation: str) -> nn.Sequential:
    """W_2 phi(W_1 x + b_1) + b_2, with W_2 = 0 and b_2 = 0."""
    hidden = int(d_in // reduction_factor)
    last = nn.Linear(hidden, d_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(d_in, hidden), ACT2FN[activation], last)
