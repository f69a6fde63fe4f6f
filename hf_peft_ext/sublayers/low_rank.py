"""LoRA's low-rank update, as a branch that can stand beside others and be gated."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.sublayers.additive import Additive, cast, gate_of
from hf_peft_ext.sublayers.gate import Gate


class LowRank(Additive):
    """delta(x) = g(x) (alpha / r) B A x,  A: (r, d_in), B: (d_out, r), B zero at the start; g = 1 without a gate.

    LoRA, Hu et al. 2022 (https://arxiv.org/abs/2106.09685), Eq. 3, with peft's initialisations. UniPELT's code lets g
    take the place of alpha / r; `alpha = r` gives that.

    Args:
        d_in: width of x.
        d_out: width of the output.
        r: rank.
        alpha: numerator of the scaling.
        dropout: probability, on x, before A.
        init_lora_weights: True (Kaiming uniform) or "gaussian" for A, as in `peft.LoraConfig`.
        rows: where the base output is wider than d_out (fused projections), the d_out rows of it that are updated.
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
        self.B = nn.Parameter(torch.zeros(d_out, r))
        self.gate = gate
        self.scaling = alpha / r
        self.dropout = nn.Dropout(dropout)
        self.width = width
        self.register_buffer("rows", rows, persistent=False)
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        visible: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d_out or width)
        z = F.linear(self.dropout(cast(x, self.A)), self.A)
        return gate_of(self.gate, x, visible) * self.scaling * F.linear(z, self.up())

    def code(self, x: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.dropout.p and self.training:  # the gate reads x without dropout, so there is no product for both
            z = F.linear(self.dropout(cast(x, self.A)), self.A)
            return z * self.scaling * gate_of(self.gate, x, visible), self.up()
        z, g = self.project(x, self.A, visible)
        z = z * self.scaling
        return (z if g is None else z * g), self.up()

    def up(self) -> Tensor:  # shape: (d_out or width, r)
        """B, spread over the rows of the base output."""
        if self.rows is None:
            return self.B
        return self.B.new_zeros(self.width, self.B.shape[1]).index_copy(0, self.rows, self.B)

    def delta_weight(self) -> Tensor:  # shape: (d_out or width, d_in)
        """The update of the base weight. Only without a gate, or with a constant one.

        Raises:
            ValueError: the gate depends on the input.
        """
        if self.gate is None:
            return self.scaling * self.up() @ self.A
        if not self.gate.is_constant:
            raise ValueError("`gate` depends on the input, so no weight equals this sub-layer; see `fix_gates`.")
        return torch.sigmoid(self.gate.bias) * self.scaling * self.up() @ self.A
