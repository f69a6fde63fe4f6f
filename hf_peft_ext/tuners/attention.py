"""Prefixes inside attention, through transformers' AttentionInterface.

Every attention module of transformers 5 looks its kernel up by name in its config. A module with a prefix gets a
shallow copy of the config that names the function below; the model's own config goes on saying "sdpa" or "eager", so
masks are made and the implementation is switched as ever. The function puts the prefix in front of keys and values,
after rotary embedding and cache, and calls the kernel that the model's config names.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..placement import check
from .attach import Attached, cached_tokens, hidden_states

NAME = "hf_peft_ext_prefix"
KERNELS = ("eager", "sdpa")

# P_K, P_V: (batch or 1, heads, n_tokens, d); what is added to their scores: (batch or 1, 1, length or 1, n_tokens)
States = tuple[Tensor, Tensor, Tensor | None]


class InAttention(Attached):
    """Attention over [P_K, K] and [P_V, V]."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        self._config = (self.host.config,)
        routed: Any = copy.copy(self.host.config)
        routed._attn_implementation_internal = NAME
        self.host.config = routed
        return [self.host.register_forward_pre_hook(self.before, with_kwargs=True)]

    def remove(self) -> None:
        self.host.config = self._config[0]
        super().remove()

    def before(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x = hidden_states(args, kwargs)
        states = self.states(x)
        if states is None:
            return None
        kwargs = {**kwargs, "prefix_states": states}
        if self.counts_positions and hasattr(attention, "relative_attention_bias"):  # other layers are handed this one
            kwargs["position_bias"] = counted_bias(attention, x.shape[1], states[0].shape[2], kwargs)
        return args, kwargs

    @property
    def counts_positions(self) -> bool:
        """Whether relative positions count the prefix.

        Raises:
            ValueError: they would have to for some rows of a batch and not for others.
        """
        counts = {prefix.counts_positions for prefix in self.sublayer_of.values()}
        rule = "cannot be mixed in one batch with prefixes that count positions"
        check("adapter_names", self.row_adapters, self.row_adapters is None or True not in counts, rule)
        return any(self.sublayer_of[name].counts_positions for name in self.present)

    def states(
        self,
        x: Tensor,  # shape: (batch, length, d)
    ) -> States | None:
        """The prefixes of the active adapters, one behind the other; None if there are none."""
        if self.row_adapters is not None:
            return self.states_by_row(x)
        parts: list[States] = [self.sublayer_of[name](x, self.visible) for name in self.present]
        if len(parts) < 2:
            return parts[0] if parts else None
        keys = torch.cat([keys.expand(len(x), -1, -1, -1) for keys, _, _ in parts], dim=2)
        values = torch.cat([values.expand(len(x), -1, -1, -1) for _, values, _ in parts], dim=2)
        if all(scores is None for _, _, scores in parts):
            return keys, values, None
        return keys, values, torch.cat([shown(part, x) for part in parts], dim=-1)

    def states_by_row(self, x: Tensor) -> States | None:
        """Each row its own prefix. Shorter ones, and rows without one, are filled up with vectors no token sees."""
        parts = [
            (rows, self.sublayer_of[name](x[rows], self.visible_rows(rows, len(x))))
            for name, rows in self.rows_by_adapter(len(x), x.device)
        ]
        if not parts:
            return None
        n_tokens = max(p_k.shape[2] for _, (p_k, _, _) in parts)
        site, like = self.site, parts[0][1][0]
        keys = like.new_zeros(len(x), site.heads, n_tokens, site.d_k)
        values = like.new_zeros(len(x), site.heads, n_tokens, site.d_v)
        scores = like.new_full((len(x), 1, x.shape[1], n_tokens), torch.finfo(like.dtype).min)
        for rows, (p_k, p_v, score) in parts:
            n = p_k.shape[2]
            keys[rows, :, :n], values[rows, :, :n] = p_k.to(like), p_v.to(like)
            scores[rows, :, :, :n] = shown((p_k, p_v, score), x[rows]).to(like)
        return keys, values, scores


def counted_bias(attention: Any, length: int, n_tokens: int, kwargs: dict[str, Any]) -> Tensor:
    """T5's bias for keys that stand n_tokens further on, behind the prefix, while the queries stay where they are.

    Shape: (1, heads, length, n_tokens + keys).
    """
    cache = kwargs.get("past_key_values")
    keys = length if cache is None else cache.get_mask_sizes(length, attention.layer_idx)[0]
    return attention.compute_bias(cached_tokens(attention, kwargs) + length, n_tokens + keys)[:, :, -length:]


def shown(states: States, x: Tensor) -> Tensor:  # shape: (batch, 1, length, n_tokens)
    """The scores of a prefix, zeros where it has none."""
    keys, _, scores = states
    shape = (len(x), 1, x.shape[1], keys.shape[2])
    return keys.new_zeros(shape) if scores is None else scores.expand(shape)


def check_kernel(attention: nn.Module) -> str:
    """The attention implementation that the model of an attention module uses.

    Raises:
        ValueError: it cannot take a prefix.
    """
    prefix = next((child for child in attention.children() if isinstance(child, InAttention)), None)
    config: Any = prefix._config[0] if prefix else attention.config
    name = config._attn_implementation or "eager"
    if name not in KERNELS:
        raise ValueError(
            f"`attn_implementation` (={name!r}) cannot take a prefix; load the model with 'sdpa' or 'eager', or call "
            f"model.set_attn_implementation('sdpa')."
        )
    return name


def kernel(module: nn.Module) -> tuple[str, Callable[..., tuple[Tensor, Tensor | None]]]:
    """Name and function of the implementation that the model's config names."""
    name = check_kernel(module)
    if name == "eager":
        return name, sys.modules[type(module).__module__].eager_attention_forward
    return name, ALL_ATTENTION_FUNCTIONS[name]


def prefix_attention(
    module: nn.Module,
    query: Tensor,  # shape: (batch, heads, length, d_k)
    key: Tensor,  # shape: (batch, kv_heads, keys, d_k)
    value: Tensor,  # shape: (batch, kv_heads, keys, d_v)
    attention_mask: Any,  # shape: (batch or 1, heads or 1, length, keys), or None
    prefix_states: States | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # shapes: (batch, length, heads, d_v), (batch, heads, length, keys)
    """softmax(Q [P_K, K]^T + [scores, mask]) [P_V, V], by the kernel that the model uses."""
    name, attend = kernel(module)
    if prefix_states is None:
        check_handed_on(module)
        return attend(module, query, key, value, attention_mask, **kwargs)
    p_k, p_v, scores = prefix_states
    batch, n_tokens = len(query), p_k.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if name == "sdpa" and attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = causal_mask(query, key)
    mask = widened(attention_mask, scores, query, key, n_tokens)
    bias = kwargs.get("position_bias")
    if bias is not None and bias.shape[-1] == key.shape[2]:  # else it counts the prefix
        kwargs["position_bias"] = F.pad(bias, (n_tokens, 0))
    key = torch.cat([p_k.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([p_v.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
    output, weights = attend(module, query, key, value, mask, **kwargs)
    return output, None if weights is None else weights[..., n_tokens:]


def check_handed_on(module: nn.Module) -> None:
    """Notice an attention module that takes keywords and does not hand them to its kernel."""
    layer = next(child for child in module.children() if isinstance(child, InAttention))
    if layer.row_adapters is None and layer.present:
        raise ValueError(
            f"`prefix` has no effect in {type(module).__name__}, which keeps its keywords from the attention kernel; "
            "leave the prefix out."
        )


def causal_mask(query: Tensor, key: Tensor) -> Tensor:  # shape: (1, 1, length, keys)
    """What sdpa's `is_causal` stands for: query t sees keys 0 to t; keys beyond the queries are an empty cache."""
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]


def widened(
    mask: Any,  # shape: (batch or 1, heads or 1, length, keys), or None
    scores: Tensor | None,  # shape: (batch or 1, 1, length or 1, n_tokens)
    query: Tensor,
    key: Tensor,
    n_tokens: int,
) -> Tensor | None:  # shape: (batch or 1, heads or 1, length, n_tokens + keys)
    """The mask over prefix and keys. Every token sees the prefix, with its score if it has one."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"A mask of type {type(mask).__name__} cannot be widened by a prefix; use sdpa or eager.")
    if scores is None:
        return None if mask is None else F.pad(mask, (n_tokens, 0), value=mask.dtype == torch.bool)
    dtype = query.dtype
    if mask is None:
        mask = query.new_zeros(1, 1, 1, key.shape[2])
    elif mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min)
    shape = [max(a, b) for a, b in zip(mask.shape[:3], scores.shape[:3], strict=True)]
    parts = [part.to(dtype).expand(*shape, -1) for part in (scores, mask)]
    return torch.cat(parts, dim=-1)


AttentionInterface.register(NAME, prefix_attention)
