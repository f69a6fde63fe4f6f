"""Attention masks: which tokens they show, and how a prefix widens them."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.attach.forward_state import derive


def mask_position(attention: nn.Module) -> tuple[str, int]:
    """Name and position of the mask among the arguments of an attention module."""
    names = list(inspect.signature(attention.forward).parameters)
    keyword = next((name for name in ("attention_mask", "mask", "attn_mask") if name in names), "attention_mask")
    return keyword, names.index(keyword) if keyword in names else len(names)


def visible_tokens(mask: Any) -> Tensor | None:
    """The keys that some query may attend to, all but padding.

    Args:
        mask: None, or a mask of shape (batch, 1, queries, keys), True or 0 where attention is allowed, or of shape
            (batch, keys).

    Returns:
        Booleans of shape (batch, keys); None if there is no mask.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"`gate_pooling` (='mean') cannot read a mask of type {type(mask).__name__}; use sdpa or eager."
        )
    return mask.bool() if mask.ndim == 2 else derive(mask, "visible", some_query_sees)


def some_query_sees(mask: Tensor) -> Tensor:
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.any(dim=2).any(dim=1)


def causal_mask(length: int, keys: int, device: torch.device, past: int = 0) -> Tensor:  # shape: (1, 1, length, keys)
    """Query t sees keys 0 to past + t."""
    return torch.ones(length, keys, dtype=torch.bool, device=device).tril(past)[None, None]


def selected(
    mask: Tensor,  # shape: (batch or 1, 1, length, keys)
    indices: Tensor,  # shape: (batch, length, selected keys)
) -> Tensor:  # shape: (batch, 1, length, keys)
    """The mask, with only the selected keys let through: sparse attention of models whose code does this itself for
    kernels that it knows by name.
    """
    shape = (indices.shape[0], *mask.shape[2:])
    others = torch.ones(shape, dtype=torch.bool, device=mask.device).scatter(-1, indices.long(), False).unsqueeze(1)
    return mask & ~others if mask.dtype == torch.bool else mask.masked_fill(others, torch.finfo(mask.dtype).min)


def widened(
    mask: Any,  # shape: (batch or 1, heads or 1, length, keys), or None
    scores: Tensor | None,  # shape: (batch or 1, 1, length or 1, n_tokens)
    keys: int,
    n_tokens: int,
    dtype: torch.dtype,
) -> Tensor | None:  # shape: (batch or 1, heads or 1, length, n_tokens + keys)
    """The mask over prefix and keys. Every token sees the prefix, with its score if it has one."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"A mask of type {type(mask).__name__} cannot be widened by a prefix; use sdpa or eager.")
    if scores is None:
        return None if mask is None else derive(mask, ("widened", n_tokens), lambda m: pad_front(m, n_tokens))
    if mask is None:
        mask = scores.new_zeros(1, 1, 1, keys)
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    shape = [max(a, b) for a, b in zip(mask.shape[:3], scores.shape[:3], strict=True)]
    parts = [part.to(dtype).expand(*shape, -1) for part in (scores, mask)]
    return torch.cat(parts, dim=-1)


def pad_front(mask: Tensor, n_tokens: int) -> Tensor:
    """A mask or a bias with n_tokens more keys in front, which are seen, without a bias."""
    return F.pad(mask, (n_tokens, 0), value=mask.dtype == torch.bool)
