"""Prefixes through the cache, for models that do not use AttentionInterface (GPT-J, BLOOM, Falcon)."""

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, EncoderDecoderCache

from hf_peft_ext.attach.attention import PrefixLayer
from hf_peft_ext.attach.forward_state import cached_tokens, hidden_states
from hf_peft_ext.attach.masks import causal_mask, mask_position, mask_with_prefix
from hf_peft_ext.attach.prefix_states import PrefixStates
from hf_peft_ext.model.structure import CACHES


class CachePrefix(PrefixLayer):
    """Attention over [P_K, K] and [P_V, V]: the cache returns the prefix in front of its keys and values, and the mask
    gets as many columns before the module runs.
    """

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        self._signature = inspect.signature(self.host.forward)
        return [self.host.register_forward_pre_hook(partial(pass_cache, self.name), with_kwargs=True)]

    def passed(
        self, attention: nn.Module, states: PrefixStates, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of the attention module by name, with the prefix in the cache and a wider mask."""
        x, n_tokens = hidden_states(args, kwargs), states.n_tokens  # x: (batch, length, d)
        arguments = {**kwargs, **dict(zip(self._signature.parameters, args, strict=False))}
        cache = next(name for name in CACHES if name in self._signature.parameters)
        keyword, _ = mask_position(attention)
        mask, past = arguments.get(keyword), arguments.get(cache)
        if isinstance(past, EncoderDecoderCache):
            past = past.self_attention_cache
        n_past = cached_tokens(attention, arguments)
        n_keys = n_past + x.shape[1]
        if mask is None and self.site.causal:
            mask = causal_mask(x.shape[1], n_keys, x.device, n_past).expand(x.shape[0], -1, -1, -1)
        arguments[keyword] = mask_with_prefix(mask, states.scores(), n_keys, n_tokens, x.dtype)
        arguments[cache] = PrefixedCache(past, states.p_k, states.p_v)
        for name in ("alibi", "position_bias"):
            if arguments.get(name) is not None:
                arguments[name] = F.pad(arguments[name], (n_tokens, 0))
        return arguments


def pass_cache(
    name: str, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    layer = getattr(attention, name)
    states = layer.states(hidden_states(args, kwargs))
    return None if states is None else ((), layer.passed(attention, states, args, kwargs))


class PrefixedCache:
    """A cache, or none, that returns keys and values with a prefix in front.

    Args:
        cache: the model's own cache; None for none.
        p_k: P_K, shape (batch or 1, heads, n_tokens, d_k).
        p_v: P_V, shape (batch or 1, heads, n_tokens, d_v).
    """

    def __init__(self, cache: Cache | None, p_k: Tensor, p_v: Tensor):
        self.cache, self.prefix = cache, (p_k, p_v)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def get_seq_length(self, *args: Any) -> int:
        """Number of cached tokens, without the prefix."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `Cache.update`. Shapes: (batch, heads, length, d) in, (batch, heads, n_tokens + keys, d) out."""
        states = (key, value) if self.cache is None else self.cache.update(key, value, *args, **kwargs)
        pairs = zip(self.prefix, states, strict=True)
        keys, values = (torch.cat([for_heads(p, state), state], dim=2) for p, state in pairs)
        return keys, values


def for_heads(p: Tensor, state: Tensor) -> Tensor:  # shape: (batch, heads, n_tokens, d)
    """The prefix for the batch, repeated for all heads that share a key and value head."""
    copies = state.shape[1] // p.shape[1]
    return p.to(state.dtype).repeat_interleave(copies, dim=1).expand(state.shape[0], -1, -1, -1)
