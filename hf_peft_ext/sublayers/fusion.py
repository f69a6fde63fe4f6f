"""Trained attention over the outputs of several frozen adapters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionFusion(nn.Module):
    """f(x) = sum_k a_k f_k(x),  a = softmax_k(q f_k(x)),  q: (d,), zero at the start: then the mean of the f_k.

    The attention of Cao et al. 2022 (https://aclanthology.org/2022.findings-naacl.64), one trained query, which there
    weighs the layers of a frozen model. Here it weighs the adapters f_k of one place, for each token.

    Args:
        d: width of the outputs.
        names: the adapters.
        sublayer_of: adapter -> its sub-layer at this place.
    """

    gate = None

    def __init__(self, d: int, names: Sequence[str], sublayer_of: nn.ModuleDict):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(d))
        self.names = tuple(names)
        self._sublayer_of = (sublayer_of,)  # in a tuple: not a child

    def forward(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d)
        """f(x)."""
        f = torch.stack([self._sublayer_of[0][name](x, token_mask) for name in self.names])  # (K, *batch, d)
        a = F.linear(f, self.q.to(f)[None]).softmax(0)  # (K, *batch, 1)
        return (a * f).sum(0)

    def add(
        self,
        y: Tensor,  # shape: (*batch, d)
        x: Tensor,  # shape: (*batch, d_in)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d)
        """y + f(x)."""
        return y + self(x, token_mask).to(y.dtype)
