"""Trained attention over the outputs of several frozen adapters."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.sublayers.gate import cast


class Fusion(nn.Module):
    """f(x) = sum_k a_k f_k(x), where the weights a sum to 1 and depend on the token.

    Args:
        names: the adapters.
        sublayer_of: adapter -> its sub-layer f_k at this place.
    """

    gate = None

    def __init__(self, names: Sequence[str], sublayer_of: nn.ModuleDict):
        super().__init__()
        self.names = tuple(names)
        self._sublayer_of = (sublayer_of,)  # in a tuple: not a child

    @abstractmethod
    def fuse(
        self,
        f: Tensor,  # shape: (K, *batch, d)
        x: Tensor,  # shape: (*batch, d_in)
    ) -> Tensor:  # shape: (*batch, d)
        """sum_k a_k f_k."""

    def forward(
        self,
        x: Tensor,  # shape: (*batch, d_in)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d)
        """f(x)."""
        return self.fuse(torch.stack([self._sublayer_of[0][name](x, token_mask) for name in self.names]), x)

    def add(
        self,
        y: Tensor,  # shape: (*batch, d)
        x: Tensor,  # shape: (*batch, d_in)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, d)
        """y + f(x)."""
        return y + self(x, token_mask).to(y.dtype)


class AttentionFusion(Fusion):
    """f(x) = sum_k a_k f_k(x),  a = softmax_k(q f_k(x) + log w_k),  q: (d,), zero at the start: then a_k = w_k.

    The attention of Cao et al. 2022 (https://aclanthology.org/2022.findings-naacl.64), one trained query, which there
    weighs the layers of a frozen model. Here it weighs the adapters f_k of one place, for each token. The prior
    weights w are ours.

    Args:
        d: width of the outputs.
        names: the adapters.
        sublayer_of: adapter -> its sub-layer at this place.
        weights: w, positive and with the sum 1; None for equal weights.
    """

    log_w: Tensor | None

    def __init__(
        self, d: int, names: Sequence[str], sublayer_of: nn.ModuleDict, weights: Sequence[float] | None = None
    ):
        super().__init__(names, sublayer_of)
        self.q = nn.Parameter(torch.zeros(d))
        self.register_buffer("log_w", None if weights is None else torch.tensor(weights).log(), persistent=False)

    def fuse(
        self,
        f: Tensor,  # shape: (K, *batch, d)
        x: Tensor,  # shape: (*batch, d_in)
    ) -> Tensor:  # shape: (*batch, d)
        """sum_k a_k f_k."""
        scores = F.linear(f, self.q.to(f)[None])  # (K, *batch, 1)
        if self.log_w is not None:
            scores = scores + self.log_w.to(f).view(-1, *[1] * (f.ndim - 1))
        return (scores.softmax(0) * f).sum(0)


class AdapterFusion(Fusion):
    """f(x) = sum_k a_k W_V f_k(x),  a = softmax_k((W_Q x + b_Q) (W_K f_k(x) + b_K)).

    Pfeiffer et al. 2021 (https://arxiv.org/abs/2005.00247), Section 3.2. As in their code, W_Q and W_K begin normal
    with standard deviation 0.02, and W_V as the identity.

    Args:
        d_in: width of x.
        d: width of the outputs.
        names: the adapters.
        sublayer_of: adapter -> its sub-layer at this place.
        value: whether there is W_V; else it is the identity.
    """

    def __init__(self, d_in: int, d: int, names: Sequence[str], sublayer_of: nn.ModuleDict, value: bool = True):
        super().__init__(names, sublayer_of)
        self.W_Q, self.W_K = nn.Parameter(torch.empty(d, d_in)), nn.Parameter(torch.empty(d, d))
        self.b_Q, self.b_K = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.W_V = nn.Parameter(torch.eye(d)) if value else None
        nn.init.normal_(self.W_Q, std=0.02)
        nn.init.normal_(self.W_K, std=0.02)

    def fuse(
        self,
        f: Tensor,  # shape: (K, *batch, d)
        x: Tensor,  # shape: (*batch, d_in)
    ) -> Tensor:  # shape: (*batch, d)
        """sum_k a_k W_V f_k; W_V is applied to the sum, which is the same."""
        f = cast(f, self.W_K)
        q = F.linear(cast(x, self.W_Q), self.W_Q, self.b_Q)  # (*batch, d)
        k = F.linear(f, self.W_K, self.b_K)  # (K, *batch, d)
        a = (q * k).sum(-1, keepdim=True).softmax(0)  # (K, *batch, 1)
        fused = (a * f).sum(0)
        return fused if self.W_V is None else F.linear(fused, self.W_V)
