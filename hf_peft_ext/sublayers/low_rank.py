"""LoRA's low-rank update, as a branch with an optional gate."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.sublayers.gate import Additive, Gate, cast, gate_factor


class LowRank(Additive):
    """delta(x) = g(x) (alpha / r) B A x,  A: (r, d_in), B: (d_out, r), B zero at the start; g = 1 without a gate.

    LoRA, Hu et al. 2022 (https://arxiv.org/abs/2106.09685), Eq. 3, with peft's initialisations. UniPELT's code
    replaces alpha / r by g; `alpha = r` gives that.

    Args:
        d_in: width of x.
        d_out: width of the output.
        r: rank.
        alpha: numerator of the scaling.
        dropout: probability, on x, before A.
        init_lora_weights: True (Kaiming uniform) or "gaussian" for A, as in `peft.LoraConfig`.
        gate: g, of width d_in; None for none.
        rows: in a fused projection, whose output is wider than d_out, the d_out rows that are updated.
        width: width of the base output, needed with `rows`.
    """

    rows: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        init_lora_weights: Literal[True, "gaussian"] = True,
        gate: Gate | None = None,
        rows: Tensor | None = None,
        width: int = 0,
    ):
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, d_in))
        self.B = nn.Parameter(torch.empty(d_out, r))
        self.gate = gate
        self.scaling = alpha / r
        self.dropout = nn.Dropout(dropout)
        self.width = width
        self.register_buffer("rows", rows, persistent=False)
        self.init_lora_weights = init_lora_weights
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New A, and B = 0."""
        nn.init.zeros_(self.B)
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.A, std=1 / len(self.A))
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d_out or width)
        """delta(x)."""
        z = F.linear(self.dropout(cast(x, self.A)), self.A)  # (*batch, r)
        return gate_factor(self.gate, x, token_mask) * self.scaling * F.linear(z, self.up())

    def code(self, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """g (alpha / r) A x, shape (*batch, r), and B, shape (d_out or width, r)."""
        up = self.B if self.rows is None else self.up()
        if self.dropout.p and self.training:  # the gate reads x without dropout, so there is no product for both
            z = F.linear(self.dropout(cast(x, self.A)), self.A)
            return z * self.scaling * gate_factor(self.gate, x, token_mask), up
        z, g = self.project(x, self.A, token_mask)
        z = z * self.scaling
        return (z if g is None else z * g), up

    def up(self) -> Tensor:  # shape: (d_out or width, r)
        """B; in a fused projection, B in its rows and zeros in the others."""
        if self.rows is None:
            return self.B
        return self.B.new_zeros(self.width, self.B.shape[1]).index_copy(0, self.rows, self.B)

    def delta_weight(self) -> Tensor:  # shape: (d_out or width, d_in)
        """g (alpha / r) B A, the update of the base weight. Only without a gate, or with a constant one.

        Raises:
            ValueError: the gate depends on the input.
        """
        if self.gate is None:
            return self.scaling * self.up() @ self.A
        if not self.gate.is_constant:
            raise ValueError("`gate` depends on the input, so no weight equals this sub-layer; see `fix_gates`.")
        return torch.sigmoid(self.gate.bias) * self.scaling * self.up() @ self.A
