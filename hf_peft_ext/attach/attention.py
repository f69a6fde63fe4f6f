"""Prefixes inside attention, through transformers' AttentionInterface.

Every attention module of transformers 5 looks its kernel up by name in its config. A module with a prefix gets a
shallow copy of the config that names `prefix_attention`. The model's own config still says "sdpa" or "eager", so the
model makes its masks and switches its implementation as before. `prefix_attention` puts the prefix in front of keys
and values, after rotary embedding and cache, and calls the kernel that the model's config names.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_peft_ext.attach.forward_state import FORWARD, cached_tokens
from hf_peft_ext.attach.layer import TunerLayer
from hf_peft_ext.attach.masks import UNMASKED, causal_mask, derive, mask_with_prefix, pad_front, selected
from hf_peft_ext.attach.prefix_states import PrefixStates, by_row, joined
from hf_peft_ext.model.structure import given_cache, source_of
from hf_peft_ext.validation.checks import check

NAME = "hf_peft_ext_prefix"
KERNELS = ("eager", "sdpa")
MODEL_CONFIG = "_hf_peft_ext_model_config"  # attribute of a module's copy of the config: the model's own


class PrefixLayer(TunerLayer):
    """Base of the layers with a prefix: attention over [P_K, K] and [P_V, V]."""

    def states(
        self,
        x: Tensor,  # shape: (batch, length, d)
    ) -> PrefixStates | None:
        """The prefixes of the active adapters, one behind the other; None if there are none."""
        if FORWARD.row_adapters is not None:
            return self.states_by_row(x)
        token_mask, parts = FORWARD.values.get(self._mask_key, UNMASKED)[self._mask_index], []
        for sublayer in self.active_here.values():
            parts.append(PrefixStates(*sublayer(x, token_mask)))
        return joined(parts, x.shape[0]) if len(parts) > 1 else parts[0] if parts else None

    def states_by_row(self, x: Tensor) -> PrefixStates | None:
        """As `states`, with its own adapter for each row."""
        batch, length = x.shape[:2]
        parts = [
            (rows, PrefixStates(*self.sublayer_of[name](x[rows], self.token_mask(rows, batch))))
            for name, rows in self.rows_by_adapter(batch, x.device)
        ]
        return by_row(parts, batch, length) if parts else None


class AttentionPrefix(PrefixLayer):
    """Through AttentionInterface: the prefix is one more keyword of a module that looks up `prefix_attention`."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        config: Any = copy.copy(self.host.config)
        setattr(config, MODEL_CONFIG, self.host.config)
        config._attn_implementation_internal = NAME
        self.host.config = config
        return [self.host.register_forward_pre_hook(partial(pass_prefix, self.name), with_kwargs=True)]

    def remove(self) -> None:
        self.host.config = getattr(self.host.config, MODEL_CONFIG)
        super().remove()

    def shift_positions(self) -> bool:
        """Whether relative positions count the prefix.

        Raises:
            ValueError: they would have to in a batch that mixes adapters, where prefixes have several lengths.
        """
        if FORWARD.row_adapters is None:
            return any(sublayer.shift_positions for sublayer in self.active_here.values())
        names = [name for name in FORWARD.row_adapters if name in self.sublayer_of]
        shifted = any(self.sublayer_of[name].shift_positions for name in names)
        rule = "cannot be mixed in one batch with prefixes that count positions"
        check("adapter_names", FORWARD.row_adapters, not shifted, rule)
        return False


def pass_prefix(
    name: str, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before an attention module runs: add the prefix to its keywords."""
    layer, x = getattr(attention, name), args[0] if args else kwargs["hidden_states"]
    states = layer.states(x)
    if states is None:
        return None
    kwargs = {**kwargs, "prefix_states": states}
    if hasattr(attention, "relative_attention_bias") and layer.shift_positions():  # T5's other layers get this one's
        kwargs["position_bias"] = shifted_bias(attention, x.shape[1], states.n_tokens, kwargs)
    return args, kwargs


def shifted_bias(
    attention: Any, length: int, n_tokens: int, kwargs: dict[str, Any]
) -> Tensor:  # shape: (1, heads, length, n_tokens + keys)
    """T5's bias where the prefix moves the keys by n_tokens, and the queries keep their positions."""
    cache = given_cache(kwargs)
    keys = length if cache is None else cache.get_mask_sizes(length, attention.layer_idx)[0]
    return attention.compute_bias(cached_tokens(attention, kwargs) + length, n_tokens + keys)[:, :, -length:]


def kernel_name(attention: nn.Module) -> str:
    """The attention implementation that the model of an attention module uses.

    Raises:
        ValueError: it cannot take a prefix.
    """
    config: Any = getattr(attention, "config", None)
    name = getattr(getattr(config, MODEL_CONFIG, config), "_attn_implementation", None) or "eager"
    if name not in KERNELS:
        raise ValueError(
            f"`attn_implementation` (={name!r}) cannot take a prefix; load the model with 'sdpa' or 'eager', or call "
            f"model.set_attn_implementation('sdpa')."
        )
    return name


def prefix_attention(
    module: nn.Module,
    query: Tensor,  # shape: (batch, heads, length, d_k)
    key: Tensor,  # shape: (batch, kv_heads, keys, d_k)
    value: Tensor,  # shape: (batch, kv_heads, keys, d_v)
    attention_mask: Any,  # shape: (batch or 1, heads or 1, length, keys), or None
    prefix_states: PrefixStates | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # shapes: (batch, length, heads, d_v), (batch, heads, length, keys)
    """softmax(Q [P_K, K]^T + [U V^T, mask]) [P_V, V], by the kernel that the model uses."""
    name = kernel_name(module)
    eager = name == "eager"
    attend = vars(source_of(module))["eager_attention_forward"] if eager else ALL_ATTENTION_FUNCTIONS[name]
    if (indices := kwargs.pop("indices", None)) is not None:
        attention_mask = selected(attention_mask, indices)
    if prefix_states is None:
        check_keyword_arrives(module)
        return attend(module, query, key, value, attention_mask, **kwargs)
    n_tokens = prefix_states.p_k.shape[2]
    bias = kwargs.get("position_bias")
    if bias is not None and bias.shape[-1] == key.shape[2]:  # else it counts the prefix
        kwargs["position_bias"] = derive(bias, ("prefix", n_tokens), partial(pad_front, n_tokens=n_tokens))
    if not eager and query.shape[2] > 1:
        return attend_without_scores(attend, module, query, key, value, attention_mask, prefix_states, **kwargs)
    mask = mask_with_prefix(attention_mask, prefix_states.scores(), key.shape[2], n_tokens, query.dtype)
    key, value = in_front(prefix_states.p_k, prefix_states.p_v, key, value)
    output, weights = attend(module, query, key, value, mask, **kwargs)
    return output, None if weights is None else weights[..., n_tokens:]


def attend_without_scores(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,  # shape: (batch, heads, length, d_k)
    key: Tensor,  # shape: (batch, kv_heads, keys, d_k)
    value: Tensor,  # shape: (batch, kv_heads, keys, d_v)
    attention_mask: Tensor | None,  # shape: (batch or 1, heads or 1, length, keys)
    states: PrefixStates,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # shape: (batch, length, heads, d_v), None
    """Attention over prefix and keys by a kernel that never stores its scores: no matrix of length x keys is built.

    - U V^T is added to the scores by `with_score_columns`.
    - Causal attention without a mask stays so: n_tokens queries are put in front, and their output is dropped. Query
      n_tokens + t then sees the prefix and the keys 0 to t.
    """
    d_k, d_v, n_tokens, length = query.shape[-1], value.shape[-1], states.p_k.shape[2], query.shape[2]
    p_k, p_v, scale = states.p_k, states.p_v, kwargs.get("scaling")
    kwargs["scaling"] = scale = d_k**-0.5 if scale is None else scale
    if states.u is not None:
        query, p_k = with_score_columns(query, states, scale)
        added = p_k.shape[-1] - d_k
        key = F.pad(key, (0, added))
        if d_v == d_k:  # else the kernel takes two widths
            p_v, value = F.pad(p_v, (0, added)), F.pad(value, (0, added))
    keys = key.shape[2]
    key, value = in_front(p_k, p_v, key, value)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and kwargs.get("position_bias") is not None:
        attention_mask = causal_mask(length, keys, query.device)  # the bias has no further queries
    if attention_mask is None and causal:
        query = F.pad(query, (0, 0, n_tokens, 0))
    else:
        attention_mask = mask_with_prefix(attention_mask, None, keys, n_tokens, query.dtype)
    output, _ = attend(module, query, key, value, attention_mask, **kwargs)
    return output[:, -length:, :, :d_v], None


def with_score_columns(
    query: Tensor,  # shape: (batch, heads, length, d_k)
    states: PrefixStates,
    scale: float,
) -> tuple[Tensor, Tensor]:  # shapes: (batch, heads, length, d), (batch, kv_heads, n_tokens, d), d = d_k + m, padded
    """[Q, U / scale] and [P_K, V], whose product is scale Q P_K^T + U V^T; the other keys get zeros there."""
    assert states.u is not None
    p_k = states.p_k
    v = p_k.new_ones(1, 1, p_k.shape[2], 1) if states.v is None else states.v  # (batch or 1, 1, n_tokens, m)
    width = -v.shape[-1] % 8  # kernels like widths that 8 divides
    u = (states.u / scale).clamp_min(torch.finfo(query.dtype).min / 4).to(query.dtype)
    u, v = F.pad(u, (0, width)), F.pad(v, (0, width)).to(p_k.dtype)
    batch = max(p_k.shape[0], v.shape[0])
    query = torch.cat([query, u.expand(*query.shape[:3], -1)], dim=-1)
    return query, torch.cat([p_k.expand(batch, -1, -1, -1), v.expand(batch, p_k.shape[1], -1, -1)], dim=-1)


def in_front(
    p_k: Tensor,  # shape: (batch or 1, kv_heads, n_tokens, d_k)
    p_v: Tensor,  # shape: (batch or 1, kv_heads, n_tokens, d_v)
    key: Tensor,  # shape: (batch, kv_heads, keys, d_k)
    value: Tensor,  # shape: (batch, kv_heads, keys, d_v)
) -> tuple[Tensor, Tensor]:  # shapes: (batch, kv_heads, n_tokens + keys, d_k), likewise d_v
    """[P_K, K] and [P_V, V]."""
    p_k = p_k.to(key.dtype).expand(key.shape[0], -1, -1, -1)
    p_v = p_v.to(value.dtype).expand(key.shape[0], -1, -1, -1)
    return torch.cat([p_k, key], dim=2), torch.cat([p_v, value], dim=2)


def check_keyword_arrives(module: nn.Module) -> None:
    """Refuse an attention module that takes keywords and does not hand them to its kernel."""
    layer = next(child for child in module.children() if isinstance(child, AttentionPrefix))
    if FORWARD.row_adapters is None and layer.active_here:
        raise ValueError(
            f"`prefix` has no effect in {type(module).__name__}, which keeps its keywords from the attention kernel; "
            "leave the prefix out."
        )


AttentionInterface.register(NAME, prefix_attention)
