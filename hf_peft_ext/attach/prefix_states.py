"""The prefixes that one attention module gets, from one adapter, from several, or from another one in each row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PrefixStates(NamedTuple):
    """A prefix, and what is added to its scores: U V^T, of low rank m; nothing if `u` is None.

    Attributes:
        p_k: P_K, shape (batch or 1, heads, n_tokens, d_k).
        p_v: P_V, shape (batch or 1, heads, n_tokens, d_v).
        u: a factor of each query, shape (batch or 1, 1, length or 1, m).
        v: a factor of each prefix vector, shape (1 or batch, 1, n_tokens, m); None for ones, with m = 1.
    """

    p_k: Tensor
    p_v: Tensor
    u: Tensor | None = None
    v: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Number of prefix vectors."""
        return self.p_k.shape[2]

    def scores(self) -> Tensor | None:  # shape: (batch or 1, 1, length or 1, n_tokens)
        """U V^T."""
        if self.u is None:
            return None
        return self.u.expand(-1, -1, -1, self.n_tokens) if self.v is None else self.u @ self.v.transpose(-1, -2)


def joined(parts: Sequence[PrefixStates], batch: int) -> PrefixStates:
    """Several prefixes, one behind the other."""
    p_k = torch.cat([part.p_k.expand(batch, -1, -1, -1) for part in parts], dim=2)
    p_v = torch.cat([part.p_v.expand(batch, -1, -1, -1) for part in parts], dim=2)
    gated = [part.u for part in parts if part.u is not None]
    if not gated:
        return PrefixStates(p_k, p_v)
    v, start, column = p_k.new_zeros(1, 1, p_k.shape[2], len(gated)), 0, 0
    for part in parts:
        end = start + part.n_tokens
        if part.u is not None:
            v[..., start:end, column] = 1.0
            column += 1
        start = end
    return PrefixStates(p_k, p_v, torch.cat(gated, dim=-1), v)


def by_row(parts: Sequence[tuple[Tensor, PrefixStates]], batch: int, length: int) -> PrefixStates:
    """Each row its own prefix. Shorter ones, and rows without one, are padded with vectors that no query sees.

    Args:
        parts: indices of rows, and the prefix of these rows.
        batch: number of rows.
        length: number of queries.
    """
    n_tokens, like = max(part.n_tokens for _, part in parts), parts[0][1].p_k
    p_k = like.new_zeros(batch, like.shape[1], n_tokens, like.shape[3])
    p_v = like.new_zeros(batch, like.shape[1], n_tokens, parts[0][1].p_v.shape[3])
    # two factors: the gate of the row's own adapter, and what hides the padding
    hidden = torch.full_like(p_k[:, :1, :1, :1], torch.finfo(like.dtype).min / 4)  # finite with other scores added
    u = torch.cat([torch.zeros_like(hidden), hidden], dim=-1).repeat(1, 1, length, 1)  # (batch, 1, length, 2)
    v = like.new_tensor([0.0, 1.0]).repeat(batch, 1, n_tokens, 1)  # (batch, 1, n_tokens, 2)
    for rows, part in parts:
        n = part.n_tokens
        p_k[rows, :, :n], p_v[rows, :, :n] = part.p_k.to(like), part.p_v.to(like)
        v[rows, :, :n] = like.new_tensor([1.0, 0.0])
        if part.u is not None:
            u[rows, :, :, 0] = part.u[..., 0].to(like)
    return PrefixStates(p_k, p_v, u, v)
