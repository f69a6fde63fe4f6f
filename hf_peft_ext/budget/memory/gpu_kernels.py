"""Makes fake CPU tensors behave as on a GPU, where the two differ in memory: kernels of attention, and autocast.

A torch without CUDA has no fake CUDA tensors, and an estimate must not depend on where it is made.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HALF = (torch.float16, torch.bfloat16)
FLASH_HEAD = 256  # the widest head of the flash kernel
# torch.amp, "CUDA Ops that can autocast to float32", as far as models use them
FLOAT32_ON_CUDA = frozenset(
    "layer_norm group_norm softmax log_softmax cross_entropy nll_loss kl_div mse_loss l1_loss smooth_l1_loss "
    "normalize norm pow __pow__ __rpow__ exp expm1 log log1p log2 log10 sum prod cumsum cumprod rsqrt reciprocal "
    "softplus cosine_similarity binary_cross_entropy_with_logits".split()
)
aten = torch.ops.aten


class GpuKernels(TorchFunctionMode):
    """Calls the operators that a GPU would run, within the context.

    Args:
        attention: the name of a kernel: flash, efficient, math; anything else is the one that torch chooses on a GPU.
    """

    def __init__(self, attention: str):
        super().__init__()
        self.kernel = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in FLOAT32_ON_CUDA:
            args, kwargs = tree_map(widened, args), tree_map(widened, kwargs)
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,  # (batch, heads, length, d_head)
        key: Tensor,  # (batch, key heads, keys, d_head)
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention` by the kernel of a GPU."""
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        takes_flash = query.dtype in HALF and query.shape[-1] <= FLASH_HEAD and attn_mask is None
        chosen = "flash" if takes_flash else "efficient"
        kernel = self.kernel if self.kernel in ("flash", "efficient", "math") else chosen
        if kernel == "flash":
            if not takes_flash:
                rule = "needs 16 bits, heads of at most 256 and no mask; use 'sdpa'"
                raise ValueError(f"`attention` (='flash') {rule}.")
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if enable_gqa and key.shape[1] != query.shape[1]:
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
        if kernel == "math":
            math = aten._scaled_dot_product_attention_math
            return math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
        bias = None if attn_mask is None else additive(attn_mask, query, key)
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]


def widened(value: Any) -> Any:
    """A 16-bit tensor in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def additive(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the bias that the efficient kernel adds to the scores: (batch, heads, length, keys)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    return mask.to(query.dtype).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
