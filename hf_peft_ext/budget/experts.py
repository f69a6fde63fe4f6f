"""Mixtures of experts on fake tensors: products by groups of rows, one group for each expert."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

GROUPED_MM = torch.ops.aten._grouped_mm


def expert_options(config: PreTrainedConfig) -> dict[str, None]:
    """Arguments of `_from_config` that let a mixture of experts run on tensors without values.

    transformers' loop over experts ("eager") needs the routing. "grouped_mm", the default where a class has it,
    computes the same rows in one product: each token as often as it has experts, wherever they are.
    """
    return {"experts_implementation": None} if getattr(config, "_experts_implementation", None) == "eager" else {}


class GroupedProducts(TorchDispatchMode):
    """Gives products by groups their shape within the context; torch has it for bfloat16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not GROUPED_MM.default:
            return func(*args, **(kwargs or {}))
        a, b = args[:2]
        offsets: Any = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
        groups = [] if a.ndim != b.ndim else [len(offsets) if a.ndim == 2 else len(a)]
        return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def grouped_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of a product by groups: each row meets the matrix of its group.

    Args:
        a: shape (rows, d_in), or with groups in front.
        b: shape (d_in, d_out), or with groups in front. Two matrices give a matrix for each group of d_in.
    """
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]
