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
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_peft_ext.attach.forward_state import FORWARD, derive
from hf_peft_ext.attach.layer import TunerLayer, cached_tokens, hidden_states
from hf_peft_ext.attach.masks import causal_mask, mask_position, pad_front, selected, widened
from hf_peft_ext.model.structure import CACHES, given_cache, source_of
from hf_peft_ext.validation.checks import check

NAME = "hf_peft_ext_prefix"
KERNELS = ("eager", "sdpa")


class States(NamedTuple):
    """A prefix, and what is added to its scores: U V^T, of low rank m; nothing where `u` is None.

    Attributes:
        keys: P_K, shape (batch or 1, heads, n_tokens, d_k).
        values: P_V, shape (batch or 1, heads, n_tokens, d_v).
        u: a factor of each query, shape (batch or 1, 1, length or 1, m).
        v: a factor of each prefix vector, shape (batch or 1, 1, n_tokens, m).
    """

    keys: Tensor
    values: Tensor
    u: Tensor | None = None
    v: Tensor | None = None

    def scores(self) -> Tensor | None:  # shape: (batch or 1, 1, length or 1, n_tokens)
        return None if self.u is None or self.v is None else self.u @ self.v.transpose(-1, -2)


class WithPrefix(TunerLayer):
    """Attention over [P_K, K] and [P_V, V]."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        return [self.host.register_forward_pre_hook(partial(pass_prefix, self.name), with_kwargs=True)]

    @abstractmethod
    def passed(
        self, attention: nn.Module, states: States, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the attention module, with the prefix among them."""

    def states(
        self,
        x: Tensor,  # shape: (batch, length, d)
    ) -> States | None:
        """The prefixes of the active adapters, one behind the other; None if there are none."""
        if FORWARD.row_adapters is not None:
            return self.states_by_row(x)
        visible = self.visible() if self._padding else None
        parts = [with_factors(*self.sublayer_of[name](x, visible)) for name in self.present]
        return joined(parts, x.shape[0]) if len(parts) > 1 else parts[0] if parts else None

    def states_by_row(self, x: Tensor) -> States | None:
        """Each row its own prefix. Shorter ones, and rows without one, are filled up with vectors no token sees."""
        batch, length = x.shape[:2]
        parts = [
            (rows, self.sublayer_of[name](x[rows], self.visible_rows(rows, batch)))
            for name, rows in self.rows_by_adapter(batch, x.device)
        ]
        if not parts:
            return None
        n_tokens = max(p_k.shape[2] for _, (p_k, _, _) in parts)
        site, like = self.site, parts[0][1][0]
        keys = like.new_zeros(batch, site.heads, n_tokens, site.d_k)
        values = like.new_zeros(batch, site.heads, n_tokens, site.d_v)
        # two factors: the gate of the row's own adapter, and what hides the filling
        u = torch.stack([like.new_zeros(batch, length), hidden_score(like, batch, length)], dim=-1).unsqueeze(1)
        v = like.new_tensor([0.0, 1.0]).repeat(batch, 1, n_tokens, 1)
        for rows, (p_k, p_v, log_g) in parts:
            n = p_k.shape[2]
            keys[rows, :, :n], values[rows, :, :n] = p_k.to(like), p_v.to(like)
            v[rows, :, :n] = like.new_tensor([1.0, 0.0])
            if log_g is not None:
                u[rows, :, :, 0] = log_g[..., 0].to(like)
        return States(keys, values, u, v)


def pass_prefix(
    name: str, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    layer = getattr(attention, name)
    states = layer.states(hidden_states(args, kwargs))
    return None if states is None else layer.passed(attention, states, args, kwargs)


def with_factors(
    keys: Tensor,  # shape: (batch or 1, heads, n_tokens, d_k)
    values: Tensor,  # shape: (batch or 1, heads, n_tokens, d_v)
    log_g: Tensor | None,  # shape: (batch, 1, length, 1)
) -> States:
    return States(keys, values, log_g, None if log_g is None else log_g.new_ones(1, 1, keys.shape[2], 1))


def joined(parts: list[States], batch: int) -> States:
    """Several prefixes, one behind the other."""
    keys = torch.cat([part.keys.expand(batch, -1, -1, -1) for part in parts], dim=2)
    values = torch.cat([part.values.expand(batch, -1, -1, -1) for part in parts], dim=2)
    gated = [part.u for part in parts if part.u is not None]
    if not gated:
        return States(keys, values)
    v, start, column = keys.new_zeros(1, 1, keys.shape[2], len(gated)), 0, 0
    for part in parts:
        n = part.keys.shape[2]
        if part.u is not None:
            v[..., start : start + n, column] = 1.0
            column += 1
        start += n
    return States(keys, values, torch.cat(gated, dim=-1), v)


def hidden_score(like: Tensor, *shape: int) -> Tensor:
    """A score that hides a key from a query, and stays finite when other scores are added."""
    return like.new_full(shape, torch.finfo(like.dtype).min / 4)


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

    def passed(
        self, attention: nn.Module, states: States, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {**kwargs, "prefix_states": states}
        if self.shift_positions() and hasattr(attention, "relative_attention_bias"):  # other layers get this one's
            length = hidden_states(args, kwargs).shape[1]
            kwargs["position_bias"] = counted_bias(attention, length, states.keys.shape[2], kwargs)
        return args, kwargs

    def shift_positions(self) -> bool:
        """Whether relative positions count the prefix.

        Raises:
            ValueError: they would have to for some rows of a batch and not for others.
        """
        if FORWARD.row_adapters is None:
            return any(self.sublayer_of[name].shift_positions for name in self.present)
        names = [name for name in FORWARD.row_adapters if name in self.sublayer_of]
        counts = any(self.sublayer_of[name].shift_positions for name in names)
        rule = "cannot be mixed in one batch with prefixes that count positions"
        check("adapter_names", FORWARD.row_adapters, not counts, rule)
        return False


class InCache(WithPrefix):
    """Through the cache, in models that do not use AttentionInterface (GPT-J, BLOOM, Falcon): it returns the prefix in
    front of its keys and values, and the mask is widened before the module runs.
    """

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        self._signature = inspect.signature(self.host.forward)
        return super().hooks(model)

    def passed(
        self, attention: nn.Module, states: States, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, n_tokens = hidden_states(args, kwargs), states.keys.shape[2]
        given = {**kwargs, **dict(zip(self._signature.parameters, args, strict=False))}
        cache = next(name for name in CACHES if name in self._signature.parameters)
        keyword, _ = mask_position(attention)
        mask, past = given.get(keyword), given.get(cache)
        if isinstance(past, EncoderDecoderCache):
            past = past.self_attention_cache
        n_past = cached_tokens(attention, given)
        n_keys = n_past + x.shape[1]
        if mask is None and self.site.causal:
            mask = causal_mask(x.shape[1], n_keys, x.device, n_past).expand(x.shape[0], -1, -1, -1)
        given[keyword] = widened(mask, states.scores(), n_keys, n_tokens, x.dtype)
        given[cache] = Cached(past, states.keys, states.values)
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
    return p.to(state.dtype).repeat_interleave(each, dim=1).expand(state.shape[0], -1, -1, -1)


def counted_bias(attention: Any, length: int, n_tokens: int, kwargs: dict[str, Any]) -> Tensor:
    """T5's bias for keys that stand n_tokens further on, behind the prefix, while the queries stay where they are.

    Shape: (1, heads, length, n_tokens + keys).
    """
    cache = given_cache(kwargs)
    keys = length if cache is None else cache.get_mask_sizes(length, attention.layer_idx)[0]
    return attention.compute_bias(cached_tokens(attention, kwargs) + length, n_tokens + keys)[:, :, -length:]


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
    n_tokens = prefix_states.keys.shape[2]
    bias = kwargs.get("position_bias")
    if bias is not None and bias.shape[-1] == key.shape[2]:  # else it counts the prefix
        kwargs["position_bias"] = derive(bias, ("widened", n_tokens), lambda b: pad_front(b, n_tokens))
    if name == "sdpa" and query.shape[2] > 1:
        return without_scores(attend, module, query, key, value, attention_mask, prefix_states, **kwargs)
    mask = widened(attention_mask, prefix_states.scores(), key.shape[2], n_tokens, query.dtype)
    key, value = in_front(prefix_states.keys, key), in_front(prefix_states.values, value)
    output, weights = attend(module, query, key, value, mask, **kwargs)
    return output, None if weights is None else weights[..., n_tokens:]


def without_scores(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,  # shape: (batch, heads, length, d_k)
    key: Tensor,  # shape: (batch, kv_heads, keys, d_k)
    value: Tensor,  # shape: (batch, kv_heads, keys, d_v)
    attention_mask: Tensor | None,  # shape: (batch or 1, heads or 1, length, keys)
    states: States,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # shape: (batch, length, heads, d_v), None
    """Attention over prefix and keys by a kernel that never writes its scores down: no matrix of length x keys here.

    - What is added to the scores of the prefix, U V^T, becomes further columns of query and key:
      scale [Q, U / scale] [P_K, V]^T = scale Q P_K^T + U V^T; the other keys have zeros there.
    - Where attention is causal without a mask, it stays so: as many queries as there are prefix vectors are put in
      front, and their output is dropped. Query n + t then sees the prefix and the keys 0 to t.
    """
    d_k, d_v, n_tokens, length = query.shape[-1], value.shape[-1], states.keys.shape[2], query.shape[2]
    scale = kwargs.get("scaling")
    kwargs["scaling"] = scale = d_k**-0.5 if scale is None else scale
    p_k, p_v = states.keys, states.values
    if states.u is not None and states.v is not None:
        width = -states.v.shape[-1] % 8  # kernels like widths that 8 divides
        u = (states.u / scale).clamp_min(torch.finfo(query.dtype).min / 4).to(query.dtype)
        query = torch.cat([query, F.pad(u, (0, width)).expand(*query.shape[:2], length, -1)], dim=-1)
        v = F.pad(states.v, (0, width)).to(p_k.dtype)
        batch = max(p_k.shape[0], v.shape[0])
        p_k = torch.cat([p_k.expand(batch, -1, -1, -1), v.expand(batch, p_k.shape[1], -1, -1)], dim=-1)
        key = F.pad(key, (0, p_k.shape[-1] - d_k))
        if d_v == d_k:  # else the kernel takes two widths
            p_v, value = F.pad(p_v, (0, p_k.shape[-1] - d_k)), F.pad(value, (0, p_k.shape[-1] - d_k))
    key, value = in_front(p_k, key), in_front(p_v, value)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and kwargs.get("position_bias") is not None:
        attention_mask = causal_mask(length, key.shape[2] - n_tokens, query.device)  # the bias has no further queries
    if attention_mask is None and causal:
        query = F.pad(query, (0, 0, n_tokens, 0))
    else:
        attention_mask = widened(attention_mask, None, key.shape[2] - n_tokens, n_tokens, query.dtype)
    output, _ = attend(module, query, key, value, attention_mask, **kwargs)
    return output[:, -length:, :, :d_v], None


def in_front(p: Tensor, state: Tensor) -> Tensor:  # shape: (batch, heads, n_tokens + keys, d)
    return torch.cat([p.to(state.dtype).expand(state.shape[0], -1, -1, -1), state], dim=2)


def check_handed_on(module: nn.Module) -> None:
    """Notice an attention module that takes keywords and does not hand them to its kernel."""
    layer = next(child for child in module.children() if isinstance(child, InAttention))
    if FORWARD.row_adapters is None and layer.present:
        raise ValueError(
            f"`prefix` has no effect in {type(module).__name__}, which keeps its keywords from the attention kernel; "
            "leave the prefix out."
        )


AttentionInterface.register(NAME, prefix_attention)
