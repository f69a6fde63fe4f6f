"""The bottleneck adapter: down to a few dimensions, through an activation, and up again."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_peft_ext.sublayers.gate import Additive, Gate, cast, gate_factor


class Bottleneck(Additive):
    """f(x) = g(x) s (W_up phi(W_down x + b_down) + b_up),  W_down: (r, d), W_up: (d, r); g = 1 without a gate.

    Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751), Figure 2; Pfeiffer et al. 2021
    (https://arxiv.org/abs/2005.00247); scaled and in parallel, He et al. 2022 (https://arxiv.org/abs/2110.04366),
    Table 1. The site decides whether it is sequential, y + f(y), or parallel, y + f(x).

    Args:
        d: width of x and of the output.
        r: width of the bottleneck.
        activation: phi, a name in transformers' `ACT2FN`.
        dropout: probability, on the code.
        scaling: s, a number or "learned" (a scalar that starts at 1).
        init: "lora": W_down Kaiming uniform and W_up zero, so that f = 0 at the start; or the standard deviation of
            both matrices, as the papers have it.
        gate: g, of width d; None for none.
        sparsity: share of the entries of both matrices that are pruned before training (`prune`); SparseAdapter, He et
            al. 2022 (https://arxiv.org/abs/2210.04284).
    """

    down: Any
    up: Any
    scaling: float | nn.Parameter
    down_mask: Tensor  # shape: (r, d), False where an entry is pruned
    up_mask: Tensor  # shape: (d, r)
    sparsity: float = 0.0
    is_pruned: bool = True

    def __init__(
        self,
        d: int,
        r: int = 48,
        activation: str = "relu",
        dropout: float = 0.0,
        scaling: float | Literal["learned"] = 1.0,
        init: float | Literal["lora"] = "lora",
        gate: Gate | None = None,
        sparsity: float = 0.0,
    ):
        super().__init__()
        self.down = nn.Linear(d, r)
        self.up = nn.Linear(r, d)
        self.gate = gate
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.scaling = nn.Parameter(torch.ones(())) if scaling == "learned" else scaling
        if init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.normal_(self.down.weight, std=init)
            nn.init.normal_(self.up.weight, std=init)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if sparsity:
            self.sparsity, self.is_pruned = sparsity, False
            self.register_buffer("down_mask", torch.ones(r, d, dtype=torch.bool))
            self.register_buffer("up_mask", torch.ones(d, r, dtype=torch.bool))

    def forward(
        self,
        x: Tensor,  # shape: (*batch, d)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d)
        """f(x)."""
        w_down, b_down, w_up, b_up = self.matrices()
        z = self.activation(F.linear(cast(x, w_down), w_down, b_down))  # (*batch, r)
        return gate_factor(self.gate, x, token_mask) * self.scaling * F.linear(self.dropout(z), w_up, b_up)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_down, b_down, W_up and b_up."""
        if self.sparsity:
            if self.training and torch.is_grad_enabled() and not self.is_pruned:
                raise RuntimeError(
                    f"`sparsity` (={self.sparsity}) needs a pruned adapter. Call `prune_bottlenecks` first, or train "
                    "by a trainer of `hf_peft_ext.trainers`, which prunes it first."
                )
            down, up = self.down.weight * self.down_mask, self.up.weight * self.up_mask
            return down, self.down.bias, up, self.up.bias
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias

    @torch.no_grad()
    def prune(self, down_mask: Tensor, up_mask: Tensor) -> None:
        """Keep the entries of W_down and W_up where the masks are True; the others become zero and stay it."""
        for linear, mask, kept in ((self.down, self.down_mask, down_mask), (self.up, self.up_mask, up_mask)):
            mask.copy_(kept)
            linear.weight.mul_(mask)
        self.is_pruned = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.is_pruned = True  # only pruned adapters are trained and saved

    def code(self, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """[g s phi(W_down x + b_down), g s], shape (*batch, r + 1), and [W_up, b_up], shape (d, r + 1)."""
        w_down, b_down, w_up, b_up = self.matrices()
        z, g = self.project(x, w_down, token_mask)
        z = self.dropout(self.activation(z + b_down))
        z = torch.cat([z, torch.ones_like(z[..., :1])], dim=-1)
        if not isinstance(self.scaling, float) or self.scaling != 1.0:
            z = z * self.scaling
        return (z if g is None else z * g), torch.cat([w_up, b_up.unsqueeze(1)], dim=1)
