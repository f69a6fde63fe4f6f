"""Merges a sub-layer into the weight or the bias of its host, and takes it out again."""

from typing import Any

import torch
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.structure import innermost
from hf_peft_ext.sublayers import Bias, LowRank, PHMRule


@torch.no_grad()
def merge_sublayer(layer: Any, sublayer: nn.Module, sign: int, safe: bool) -> None:
    """Add sign * delta of a sub-layer to the weight (low-rank) or the bias (bias) of its host.

    Args:
        layer: the tuner layer.
        sublayer: one of its sub-layers.
        sign: 1 to merge, -1 to unmerge.
        safe: whether values are checked.

    Raises:
        ValueError: `safe`, and the sum holds values that are not finite.
    """
    base: Any = innermost(layer.host)
    if isinstance(sublayer, Bias):
        layer.adds_bias = layer.adds_bias or base.bias is None
        bias = torch.zeros_like(sublayer.b) if base.bias is None else base.bias
        base.bias = nn.Parameter(finite(bias + sign * sublayer.b.to(bias), safe), requires_grad=False)
        if layer.adds_bias and sign < 0 and len(layer.merged_adapters) == 1:
            base.bias = None  # the last merged bias is gone
    elif isinstance(sublayer, LowRank):
        layer.quantization_backend = resolve_quantization_backend(base)
        weight = layer.get_base_weight()
        delta = sublayer.delta_weight().to(weight)  # (d_out, d_in)
        layer.set_base_weight(finite(weight + sign * (delta.T if isinstance(base, Conv1D) else delta), safe))


def can_merge(sublayer: nn.Module) -> bool:
    """Whether a weight or a bias equals the sub-layer: biases, and low-rank branches without a gate or a fixed one.

    A rule by itself adds nothing; the bottlenecks that use it say why they cannot be merged.
    """
    if isinstance(sublayer, LowRank):
        return sublayer.gate is None or sublayer.gate.is_constant
    return isinstance(sublayer, Bias | PHMRule)


def finite(value: Tensor, safe: bool) -> Tensor:
    if safe and not value.isfinite().all():
        raise ValueError("`safe_merge` (=True) found values that are not finite in the merged weight.")
    return value
