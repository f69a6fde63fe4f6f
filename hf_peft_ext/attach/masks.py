"""Attention masks: which tokens are padding, and how a prefix widens a mask."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_peft_ext.attach.forward_state import FORWARD, cached_tokens, new_key
from hf_peft_ext.attach.hook_order import move_first

UNMASKED = (None, None)  # no padding, see `PaddingRecorder`


def derive(source: Tensor, name: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(source), computed once for all layers that are given the same source.

    The result must not be a view of the source. It is computed anew where the source needs a gradient, since a forward
    under gradient checkpointing runs twice, and where operations are recorded (torch.compile, CUDA graphs).

    Args:
        source: a mask or a bias.
        name: tells several results from one source apart.
        make: computes the result.
    """
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    recorded = recorded or (source.is_cuda and torch.cuda.is_current_stream_capturing())
    if recorded or source.requires_grad or source.is_inference():  # inference tensors count no versions
        return make(source)
    version, results = FORWARD.derived.get(source) or (-1, {})
    if version != source._version:
        results = {}
        FORWARD.derived[source] = source._version, results
    if name not in results:
        results[name] = make(source)
    return results[name]


# Padding

HIDES_BELOW = -5000.0  # masks that are added hide a key by -10,000 (MarkupLM) or by the lowest number of their type


class PaddingRecorder:
    """A hook before an attention module: records for the layers of its block which keys are padding.

    It hands on a pair of masks of shape (batch, keys), False at padding, or None: over the keys in use, and over all
    keys, as they are wanted for those of an encoder.

    It reads the mask inside the block, so that a block recomputed by gradient checkpointing reads its own mask again.
    A mask that is no tensor is recorded unread: a gate that needs it refuses it.
    """

    def __init__(self, attention: nn.Module):
        self.key = new_key("padding")
        self.keyword, self.position = mask_position(attention)

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get(self.keyword, args[self.position] if len(args) > self.position else None)
        used = mask
        if isinstance(mask, Tensor):
            mask = used = mask.bool() if mask.ndim == 2 else derive(mask, "tokens", some_query_sees)  # (batch, keys)
            length = (args[0] if args else kwargs["hidden_states"]).shape[1]
            if mask.shape[1] != length:  # a cache may have empty keys behind its tokens
                used = mask[:, : cached_tokens(attention, kwargs) + length]
        FORWARD.hand_on(self.key, (used, mask))


def record_padding(attention: nn.Module, block: nn.Module) -> tuple[str, list[RemovableHandle]]:
    """Have an attention module record which keys are padding, until its block has run.

    Args:
        attention: the attention module.
        block: its block.

    Returns:
        The key of the masks in `FORWARD.values` (see `PaddingRecorder`), and the hooks that were added, none if the
        module records its mask already.
    """
    for hook in attention._forward_pre_hooks.values():
        if type(hook) is PaddingRecorder:  # others hand on other masks
            return hook.key, []
    recorder = PaddingRecorder(attention)
    handle = attention.register_forward_pre_hook(recorder, with_kwargs=True)
    move_first(attention._forward_pre_hooks, handle)
    return recorder.key, [
        handle,
        block.register_forward_hook(partial(forget_padding, recorder.key), always_call=True),
    ]


def forget_padding(key: str, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    FORWARD.values.pop(key, None)


def block_of(model: nn.Module, attention: str) -> str:
    """Path of the block of an attention module: its part of the outermost list (blocks of T5 have lists inside)."""
    parts = attention.split(".")
    for i in range(len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1])


def mask_position(attention: nn.Module) -> tuple[str, int]:
    """Name and position of the mask among the arguments of an attention module."""
    names = list(inspect.signature(attention.forward).parameters)
    keyword = next((name for name in ("attention_mask", "mask", "attn_mask") if name in names), "attention_mask")
    return keyword, names.index(keyword) if keyword in names else len(names)


def some_query_sees(
    mask: Tensor,  # shape: (batch, 1, queries, keys): True, 0.0 or (DeBERTa) 1 where attention is allowed
) -> Tensor:  # shape: (batch, keys)
    """Whether some query may attend to a key, which holds for all keys but padding."""
    allowed = mask > HIDES_BELOW if mask.is_floating_point() else mask.bool()
    return allowed.any(dim=2).any(dim=1)


# Masks over a prefix and keys


def causal_mask(length: int, keys: int, device: torch.device, past: int = 0) -> Tensor:  # shape: (1, 1, length, keys)
    """Query t sees keys 0 to past + t."""
    return torch.ones(length, keys, dtype=torch.bool, device=device).tril(past)[None, None]


def selected(
    mask: Tensor,  # shape: (batch or 1, 1, length, keys)
    indices: Tensor,  # shape: (batch, length, selected keys)
) -> Tensor:  # shape: (batch, 1, length, keys)
    """The mask with all but the selected keys hidden: sparse attention, which some models leave to kernels that they
    know by name.
    """
    shape = (indices.shape[0], *mask.shape[2:])
    others = torch.ones(shape, dtype=torch.bool, device=mask.device).scatter(-1, indices.long(), False).unsqueeze(1)
    return mask & ~others if mask.dtype == torch.bool else mask.masked_fill(others, torch.finfo(mask.dtype).min)


def mask_with_prefix(
    mask: Any,  # shape: (batch or 1, heads or 1, length, keys), or None
    scores: Tensor | None,  # shape: (batch or 1, 1, length or 1, n_tokens)
    keys: int,
    n_tokens: int,
    dtype: torch.dtype,
) -> Tensor | None:  # shape: (batch or 1, heads or 1, length, n_tokens + keys)
    """The mask over prefix and keys. Every query sees the prefix, with `scores` added if there are any.

    Raises:
        ValueError: the mask is of another kind, such as flex attention's.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"A mask of type {type(mask).__name__} cannot take a prefix; use sdpa or eager.")
    if scores is None:
        return None if mask is None else derive(mask, ("prefix", n_tokens), partial(pad_front, n_tokens=n_tokens))
    if mask is None:
        mask = scores.new_zeros(1, 1, 1, keys)
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    shape = [max(a, b) for a, b in zip(mask.shape[:3], scores.shape[:3], strict=True)]
    parts = [part.to(dtype).expand(*shape, -1) for part in (scores, mask)]
    return torch.cat(parts, dim=-1)


def pad_front(mask: Tensor, n_tokens: int) -> Tensor:
    """A mask or a bias with n_tokens more keys in front, which every query sees, without a bias."""
    return F.pad(mask, (n_tokens, 0), value=mask.dtype == torch.bool)
