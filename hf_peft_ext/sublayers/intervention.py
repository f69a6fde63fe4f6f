"""ReFT's interventions: low-rank edits of the first and the last hidden states of a sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_peft_ext.sublayers.gate import cast


class Edit(nn.Module):
    """e(h) = dropout(h + R^T (phi(W h + b) - R h)),  R and W: (r, d), b: (r,).

    Args:
        d: width of h.
        r: number of directions.
        orthogonality: whether the rows of R are made orthonormal; h then changes in their span alone.
        subtract_projection: whether R h is subtracted.
        activation: phi, a name in transformers' `ACT2FN`.
        dropout: applied to the edited state, h included, as in the paper's code.
    """

    def __init__(
        self, d: int, r: int, orthogonality: bool, subtract_projection: bool, activation: str, dropout: float
    ):
        super().__init__()
        self.R = nn.Parameter(nn.init.orthogonal_(torch.empty(r, d)))
        self.W = nn.Parameter(self.R.detach().clone() if subtract_projection else torch.zeros(r, d))
        self.b = nn.Parameter(torch.zeros(r))
        self.orthogonality, self.subtract_projection = orthogonality, subtract_projection
        self.activation, self.dropout = ACT2FN[activation], nn.Dropout(dropout)

    def rows(self) -> Tensor:  # shape: (r, d)
        """R, with orthonormal rows if asked. Rows that are orthonormal already are kept."""
        if not self.orthogonality:
            return self.R
        q, triangle = torch.linalg.qr(self.R.float().t())  # (d, r), (r, r)
        return (q * triangle.diagonal().sign()).t().to(self.R.dtype)

    def forward(
        self,
        h: Tensor,  # shape: (batch, length, d)
    ) -> Tensor:  # shape: (batch, length, d)
        """e(h)."""
        x, rows = cast(h, self.W), self.rows()
        code = self.activation(F.linear(x, self.W, self.b))  # (batch, length, r)
        if self.subtract_projection:
            code = code - F.linear(x, rows)
        return self.dropout(h + F.linear(code, rows.t()).to(h.dtype))


class Intervention(nn.Module):
    """h_t becomes e(h_t) at the first and the last tokens of a sequence, padding not counted.

    ReFT, Wu et al. 2024 (https://arxiv.org/abs/2404.03592), section 3.2: LoReFT by default, NoReFT without
    `orthogonality`, DiReFT without `subtract_projection` too. A token that is among the first and the last ones is
    edited as one of the last, as in AdapterHub's library. Tokens that follow others in a cache are none of the last:
    with `suffix_positions`, generation edits the end of the prompt only, as the paper does.

    It starts with W = R (W = 0 without `subtract_projection`) and b = 0, so that e(h) = h for the identity as
    activation and no dropout; the paper draws W.

    Args:
        d: width of h.
        r: number of directions of each edit.
        prefix_positions: number of first tokens to edit.
        suffix_positions: number of last tokens to edit.
        tied_weights: whether first and last tokens have one edit in common.
        orthogonality, subtract_projection, activation, dropout: see `Edit`.
    """

    gate = None

    def __init__(
        self,
        d: int,
        r: int = 4,
        prefix_positions: int = 3,
        suffix_positions: int = 0,
        tied_weights: bool = False,
        orthogonality: bool = True,
        subtract_projection: bool = True,
        activation: str = "linear",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.prefix_positions, self.suffix_positions = prefix_positions, suffix_positions
        self.edit_of = nn.ModuleDict(
            {
                name: Edit(d, r, orthogonality, subtract_projection, activation, dropout)
                for name in edit_names(prefix_positions, suffix_positions, tied_weights)
            }
        )

    def add(
        self,
        y: Tensor,  # shape: (batch, length, d)
        x: Tensor,  # shape: (batch, length, d), the same
        token_mask: Tensor | None = None,  # shape: (batch or 1, tokens): False at padding; x has the last ones
    ) -> Tensor:  # shape: (batch, length, d)
        """y with its first and last tokens edited.

        Raises:
            ValueError: the mask is no tensor, such as flex attention's.
        """
        length = y.shape[1]
        if token_mask is None:
            token_mask = torch.ones(1, length, dtype=torch.bool, device=y.device)
        if not isinstance(token_mask, Tensor):
            raise ValueError(f"An intervention cannot read a mask of type {type(token_mask).__name__}; use sdpa.")
        edits = list(self.edit_of.values())
        if self.prefix_positions:
            number = token_mask.cumsum(1)[:, -length:]  # 1 at the first token, (batch or 1, length)
            chosen = token_mask[:, -length:] & (number <= self.prefix_positions)
            y = torch.where(chosen[..., None], edits[0](x), y)
        if self.suffix_positions and token_mask.shape[1] == length:
            number = token_mask.flip(1).cumsum(1).flip(1)  # 1 at the last token
            chosen = token_mask & (number <= self.suffix_positions)
            y = torch.where(chosen[..., None], edits[-1](x), y)
        return y


def edit_names(prefix_positions: int, suffix_positions: int, tied_weights: bool) -> list[str]:
    """The names of the edits that an intervention has: those of the tokens that it edits, or one for all."""
    if tied_weights:
        return ["all"]
    return ["first"] * (prefix_positions > 0) + ["last"] * (suffix_positions > 0)
