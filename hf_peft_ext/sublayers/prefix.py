"""Trained prefix vectors that attention sees as further keys and values."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.sublayers.gate import Gate, cast, gate_factor

PrefixForm = Literal["separate", "joint"]


class Prefix(nn.Module):
    """P_K: (heads, n_tokens, d_k) and P_V: (heads, n_tokens, d_v), further keys and values of an attention module.

    There are two forms. Q, K and V are those of the base model; a gate g is 1 if there is none.

    - `"joint"`: softmax(Q [P_K, K]^T) [P_V, V], one softmax over both. Prefix-tuning, Li and Liang 2021
      (https://arxiv.org/abs/2101.00190), Eq. 3. An untrained prefix already takes its share of the softmax: ten
      vectors with scores near 0 take much of it over a short text. A mean gate scales the vectors, g P_K and g P_V:
      UniPELT's form (Mao et al. 2022, section 3.2). A gate per token adds log g to the scores of the prefix, which
      vanishes as g falls to 0.
    - `"separate"`: softmax(Q K^T) V + g softmax(Q P_K^T) P_V, a softmax for each. LLaMA-Adapter's zero-init attention,
      Zhang et al. 2023 (https://arxiv.org/abs/2303.16199), Eq. 8 to 10, with P_V zero at the start, as LoRA's B, in
      place of the paper's tanh(g) with g zero. The model starts as the base model, the base attention and its kernel
      stay as they are, and a token's prefix depends on no other token.

    Args:
        heads: number of key and value heads.
        n_tokens: number of prefix vectors.
        d_k: width of a key head.
        d_v: width of a value head.
        form: how attention sees the prefix.
        gate: g, of the width of x; None for none.
        shift_positions: whether relative positions (T5's) count the prefix, which moves all keys by n_tokens, as in
            AdapterHub's library. Not for `"separate"`.
    """

    def __init__(
        self,
        heads: int,
        n_tokens: int,
        d_k: int,
        d_v: int,
        form: PrefixForm = "separate",
        gate: Gate | None = None,
        shift_positions: bool = False,
    ):
        super().__init__()
        self.form: PrefixForm = form
        self.shift_positions = shift_positions
        self.P_K = nn.Parameter(torch.empty(heads, n_tokens, d_k))
        self.P_V = nn.Parameter(torch.zeros(heads, n_tokens, d_v))
        self.gate = gate
        if form == "separate":
            nn.init.normal_(self.P_K)
        else:
            nn.init.normal_(self.P_K, std=0.02)
            nn.init.normal_(self.P_V, std=0.02)

    def vectors(self) -> tuple[Tensor, Tensor]:  # shapes: (heads, n_tokens, d_k), (heads, n_tokens, d_v)
        """P_K and P_V."""
        return self.P_K, self.P_V

    def attend(
        self,
        q: Tensor,  # shape: (*batch, query heads * d_k)
        x: Tensor,  # shape: (batch, length, d)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (*batch, query heads * d_v)
        """g softmax(Q P_K^T / sqrt(d_k)) P_V: what a separate prefix adds to the output of attention.

        Args:
            q: the queries, before they are split into heads.
            x: the hidden states that attention and its gate read.
            token_mask: False at padding, for a mean gate.
        """
        p_k, p_v = self.vectors()
        heads, _, d_k = p_k.shape
        groups = q.shape[-1] // (heads * d_k)  # query heads that share a key head
        q = cast(q, p_k).reshape(-1, heads, groups, d_k).transpose(0, 1).flatten(1, 2)  # (heads, queries, d_k)
        scores = q @ (p_k * d_k**-0.5).transpose(1, 2)  # (heads, queries, n_tokens)
        share = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        o = (share @ p_v).unflatten(1, (-1, groups)).transpose(0, 1)  # (tokens, heads, groups, d_v)
        return gate_factor(self.gate, x, token_mask) * o.reshape(*x.shape[:-1], -1)

    def forward(
        self,
        x: Tensor,  # shape: (batch, length, d)
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The keys and values of a joint softmax: P_K and P_V, shape (batch or 1, heads, n_tokens, d), scaled by a
        mean gate; log g of a token gate, shape (batch, 1, length, 1), which is added to the scores of all prefix
        vectors, else None.
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
        heads, n_tokens, d_k, d_v: as in `Prefix`.
        projection: tanh(W_1 E), shared by all layers.
        options: the other arguments of `Prefix`.
    """

    def __init__(
        self,
        heads: int,
        n_tokens: int,
        d_k: int,
        d_v: int,
        projection: Projection,
        **options: Any,
    ):
        super().__init__(heads, n_tokens, d_k, d_v, **options)
        del self.P_K, self.P_V
        self.projection = projection
        self.shape = (heads, n_tokens, d_k, d_v)
        self.last = nn.Linear(projection.hidden.out_features, heads * (d_k + d_v))
        if self.form == "separate":
            with torch.no_grad():
                self.last.weight.unflatten(0, (heads, -1))[:, d_k:] = 0.0
                self.last.bias.unflatten(0, (heads, -1))[:, d_k:] = 0.0

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
        prefix = Prefix(*self.shape, self.form, self.gate, self.shift_positions)
        prefix = prefix.to(weight.device, weight.dtype)
        with torch.no_grad():
            for parameter, value in zip((prefix.P_K, prefix.P_V), self.vectors(), strict=True):
                parameter.copy_(value)
        return prefix.requires_grad_(weight.requires_grad).train(self.training)
