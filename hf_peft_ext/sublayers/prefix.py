"""Trained prefix vectors, in front of the keys and values of attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.sublayers.gate import Gate


class Prefix(nn.Module):
    """P_K: (heads, n_tokens, d_k) and P_V: (heads, n_tokens, d_v), for attention over [P_K, K] and [P_V, V].

    Prefix-tuning, Li and Liang 2021 (https://arxiv.org/abs/2101.00190), Eq. 3. A gate g works in one of two ways:

    - mean over tokens: g P_K and g P_V, UniPELT's form (Mao et al. 2022, section 3.2);
    - per token: log g is added to the scores of the prefix. The prefix vanishes as g falls to 0. With scaled keys it
      would not: a score of 0 still takes its share of the softmax.

    Args:
        heads: number of key and value heads.
        n_tokens: number of prefix vectors.
        d_k: width of a key head.
        d_v: width of a value head.
        gate: g, of the width of x; None for none.
        shift_positions: whether relative positions (T5's) count the prefix, which moves all keys by n_tokens, as in
            AdapterHub's library.
    """

    def __init__(
        self,
        heads: int,
        n_tokens: int,
        d_k: int,
        d_v: int,
        gate: Gate | None = None,
        shift_positions: bool = False,
    ):
        super().__init__()
        self.shift_positions = shift_positions
        self.P_K = nn.Parameter(torch.empty(heads, n_tokens, d_k))
        self.P_V = nn.Parameter(torch.empty(heads, n_tokens, d_v))
        self.gate = gate
        nn.init.normal_(self.P_K, std=0.02)
        nn.init.normal_(self.P_V, std=0.02)

    def vectors(self) -> tuple[Tensor, Tensor]:  # shapes: (heads, n_tokens, d_k), (heads, n_tokens, d_v)
        """P_K and P_V."""
        return self.P_K, self.P_V

    def forward(
        self,
        x: Tensor,  # shape: (batch, length, d)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """P_K and P_V, shape (batch or 1, heads, n_tokens, d), scaled by a mean gate; log g of a token gate, shape
        (batch, 1, length, 1), which is added to the scores of all prefix vectors, else None.
        """
        p_k, p_v = self.vectors()
        p_k, p_v = p_k.unsqueeze(0), p_v.unsqueeze(0)
        if self.gate is None:
            return p_k, p_v, None
        score = F.linear(x.to(self.gate.weight.dtype), self.gate.weight)  # (batch, length, 1)
        g = self.gate(score, token_mask).unsqueeze(1)  # (batch, 1, length or 1, 1)
        if self.gate.pooling != "token":
            return g * p_k, g * p_v, None
        return p_k, p_v, g.clamp_min(torch.finfo(g.dtype).tiny).log()


class Projection(nn.Module):
    """tanh(W_1 E),  E: (n_tokens, d), W_1: (hidden, d): the part of the reparameterisation that all layers share.

    Li and Liang 2021 (https://arxiv.org/abs/2101.00190), section 4.3.

    Args:
        n_tokens: number of prefix vectors.
        d: width of an embedding.
        hidden: width of the network.
    """

    def __init__(self, n_tokens: int, d: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d)
        self.hidden = nn.Linear(d, hidden)

    def forward(self) -> Tensor:  # shape: (n_tokens, hidden)
        """tanh(W_1 E)."""
        return torch.tanh(self.hidden(self.embedding.weight))


class ProjectedPrefix(Prefix):
    """[P_K, P_V] = W_2 tanh(W_1 E): prefixes as the output of a network while they are trained.

    Li and Liang 2021, section 4.3; UniPELT, Eq. 2. E and W_1 are shared by all layers, W_2 is this layer's slice of
    the paper's last matrix.

    Args:
        heads, n_tokens, d_k, d_v, gate, shift_positions: as in `Prefix`.
        projection: tanh(W_1 E), shared by all layers.
    """

    def __init__(
        self,
        heads: int,
        n_tokens: int,
        d_k: int,
        d_v: int,
        projection: Projection,
        gate: Gate | None = None,
        shift_positions: bool = False,
    ):
        super().__init__(heads, n_tokens, d_k, d_v, gate, shift_positions)
        del self.P_K, self.P_V
        self.projection = projection
        self.shape = (heads, n_tokens, d_k, d_v)
        self.last = nn.Linear(projection.hidden.out_features, heads * (d_k + d_v))

    def vectors(self) -> tuple[Tensor, Tensor]:  # shapes: (heads, n_tokens, d_k), (heads, n_tokens, d_v)
        """P_K and P_V, the output of the network."""
        heads, n_tokens, d_k, d_v = self.shape
        shared = self.projection().to(self.last.weight.device)  # layers may be on several devices
        p = self.last(shared).view(n_tokens, heads, d_k + d_v).transpose(0, 1)  # (heads, n_tokens, d_k + d_v)
        p_k, p_v = p.split([d_k, d_v], dim=-1)
        return p_k, p_v

    def to_plain(self) -> Prefix:
        """The plain prefix with the same vectors, on the same device and in the same type."""
        weight = self.last.weight
        prefix = Prefix(*self.shape, gate=self.gate, shift_positions=self.shift_positions).to(
            weight.device, weight.dtype
        )
        with torch.no_grad():
            for parameter, value in zip((prefix.P_K, prefix.P_V), self.vectors(), strict=True):
                parameter.copy_(value)
        return prefix.requires_grad_(weight.requires_grad).train(self.training)
