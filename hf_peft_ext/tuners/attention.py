"""Prefixes inside attention, through transformers' AttentionInterface.

Every attention module of transformers 5 looks its kernel up by name in its config. A module with a prefix gets a
shallow copy of the config that names the function below; the model's own config goes on saying "sdpa" or "eager", so
masks are made and the implementation is switched as ever. The function puts the prefix in front of keys and values,
after rotary embedding and cache, and calls the kernel that the model's config names.
"""

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..placement import check
from ..structure import CACHES, given_cache, source_of
from .attach import Attached, cached_tokens, hidden_states
from .masks import causal_mask, selected, widened

NAME = "hf_peft_ext_prefix"
KERNELS = ("eager", "sdpa")

# P_K, P_V: (batch or 1, heads, n_tokens, d); what is added to their scores: (batch or 1, 1, length or 1, n_tokens)
States = tuple[Tensor, Tensor, Tensor | None]


class WithPrefix(Attached):
    """Attention over [P_K, K] and [P_V, V]."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        return [self.host.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        states = self.states(hidden_states(args, kwargs))
        return None if states is None else self.passed(states, args, kwargs)

    @abstractmethod
    def passed(
        self, states: States, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the attention module, with the prefix among them."""

    def states(
        self,
        x: Tensor,  # shape: (batch, length, d)
    ) -> States | None:
        """The prefixes of the active adapters, one behind the other; None if there are none."""
        if self.row_adapters is not None:
            return self.states_by_row(x)
        parts: list[States] = [
            self.sublayer_of[name].states(self.reader.read(self, name, x), self.visible) for name in self.present
        ]
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


class InAttention(WithPrefix):
    """Through AttentionInterface: the prefix is one more keyword, and the module looks up `prefix_attention`."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        self._config = (self.host.config,)
        routed: Any = copy.copy(self.host.config)
        routed._attn_implementation_internal = NAME
        self.host.config = routed
        return super().hooks(model)

    def remove(self) -> None:
        self.host.config = self._config[0]
        super().remove()

    def passed(self, states: States, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = {**kwargs, "prefix_states": states}
        if self.counts_positions and hasattr(self.host, "relative_attention_bias"):  # other layers are handed this one
            length = hidden_states(args, kwargs).shape[1]
            kwargs["position_bias"] = counted_bias(self.host, length, states[0].shape[2], kwargs)
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


class InCache(WithPrefix):
    """Through the cache, in models that do not use AttentionInterface (GPT-J, BLOOM, Falcon): it returns the prefix in
    front of its keys and values, and the mask is widened before the module runs.
    """

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        self._signature = inspect.signature(self.host.forward)
        return super().hooks(model)

    def passed(self, states: States, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        p_k, p_v, scores = states
        x, n_tokens = hidden_states(args, kwargs), p_k.shape[2]
        given = {**kwargs, **dict(zip(self._signature.parameters, args, strict=False))}
        cache = next(name for name in CACHES if name in self._signature.parameters)
        mask, past = given.get(self._mask[0]), given.get(cache)
        if isinstance(past, EncoderDecoderCache):
            past = past.self_attention_cache
        n_past = cached_tokens(self.host, given)
        n_keys = n_past + x.shape[1]
        if mask is None and self.site.causal:
            mask = causal_mask(x.shape[1], n_keys, x.device, n_past).expand(len(x), -1, -1, -1)
        given[self._mask[0]] = widened(mask, scores, n_keys, n_tokens, x.dtype)
        given[cache] = Cached(past, p_k, p_v)
        for name in ("alibi", "position_bias"):
            if given.get(name) is not None:
                given[name] = F.pad(given[name], (n_tokens, 0))
        return (), given


class Cached:
    """A cache, or none, that returns keys and values with a prefix in front."""

    def __init__(self, cache: Cache | None, p_k: Tensor, p_v: Tensor):
        self.cache, self.prefix = cache, (p_k, p_v)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        states = (key, value) if self.cache is None else self.cache.update(key, value, *args, **kwargs)
        pairs = zip(self.prefix, states, strict=True)
        first, second = (torch.cat([repeated(p, state), state], dim=2) for p, state in pairs)
        return first, second


def repeated(p: Tensor, state: Tensor) -> Tensor:  # shape: (batch, heads, n_tokens, d)
    """The prefix for the batch, and for as many heads as the module has made of the key and value heads."""
    each = state.shape[1] // p.shape[1]
    return p.to(state.dtype).repeat_interleave(each, dim=1).expand(len(state), -1, -1, -1)


def counted_bias(attention: Any, length: int, n_tokens: int, kwargs: dict[str, Any]) -> Tensor:
    """T5's bias for keys that stand n_tokens further on, behind the prefix, while the queries stay where they are.

    Shape: (1, heads, length, n_tokens + keys).
    """
    cache = given_cache(kwargs)
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
    config: Any = prefix._config[0] if prefix else getattr(attention, "config", None)
    name = getattr(config, "_attn_implementation", None) or "eager"
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
        return name, vars(source_of(module))["eager_attention_forward"]
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
    if (indices := kwargs.pop("indices", None)) is not None:
        attention_mask = selected(attention_mask, indices)
    if prefix_states is None:
        check_handed_on(module)
        return attend(module, query, key, value, attention_mask, **kwargs)
    p_k, p_v, scores = prefix_states
    batch, n_tokens = len(query), p_k.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if name == "sdpa" and attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
    mask = widened(attention_mask, scores, key.shape[2], n_tokens, query.dtype)
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


AttentionInterface.register(NAME, prefix_attention)
