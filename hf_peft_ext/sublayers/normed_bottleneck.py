"""A bottleneck with layer norms of its own."""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.sublayers.bottleneck import Bottleneck
from hf_peft_ext.sublayers.gate import cast, gate_factor

OwnNorm = Literal["before", "after", "both"]


class NormedBottleneck(Bottleneck):
    """f(x) = LN_after(g(x) s (W_up phi(W_down LN_before(x) + b_down) + b_up)), with one of the norms or both.

    AdapterHub's `ln_before` and `ln_after`, from the comparison of Pfeiffer et al. 2021
    (https://arxiv.org/abs/2005.00247), Appendix A. The gate reads x itself. With W_up zero f = 0, as without norms.

    Args:
        d: width of x and of the output.
        norm: "before", "after" or "both".
        options: the other arguments of `Bottleneck`.
    """

    def __init__(self, d: int, *, norm: OwnNorm, **options: Any):
        super().__init__(d, **options)
        if norm != "after":
            self.norm_before = nn.LayerNorm(d)
        if norm != "before":
            self.norm_after = nn.LayerNorm(d)
        self.norm = norm

    def forward(
        self,
        x: Tensor,  # shape: (*batch, d)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d)
        """f(x)."""
        w_down, b_down, w_up, b_up = self.matrices()
        code = cast(x, w_down)
        if self.norm != "after":
            code = self.norm_before(code)
        z = self.dropout(self.activation(F.linear(code, w_down, b_down)))  # (*batch, r)
        output = gate_factor(self.gate, x, token_mask) * self.scaling * F.linear(z, w_up, b_up)
        return output if self.norm == "before" else self.norm_after(output)

    def add(
        self,
        y: Tensor,  # shape: (*batch, d)
        x: Tensor,  # shape: (*batch, d)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d)
        """y + f(x)."""
        return y + self(x, token_mask).to(y.dtype)
