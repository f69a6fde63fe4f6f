"""The two leaves of an attention module between which a prefix with a softmax of its own can sit."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_peft_ext.model.attention_shape import fused_rows
from hf_peft_ext.model.structure import is_bypassed, leaf_size

# Attention whose output leaf reads other tokens than its query leaf, or in another order: global tokens, hashed
# buckets, n-gram streams, quantized pairs.
REGROUPED = {
    *("LongformerSelfAttention", "LEDEncoderSelfAttention", "PegasusXGlobalLocalAttention", "IBertSelfAttention"),
    *("LSHSelfAttention", "LocalSelfAttention", "ProphetNetNgramSelfAttention"),
}


def prefix_leaves(
    model: nn.Module, leaves: Mapping[str, str], attention: nn.Module, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """The fields of an attention `Site` about its queries and its output.

    Args:
        model: the model.
        leaves: role -> path of the leaf, of an attention module.
        attention: the attention module.
        shape: number of key and value heads, and the widths of a key and of a value.

    Returns:
        Empty if a leaf is missing, may never be called, or is of another width, or if tokens are regrouped between the
        two leaves.
    """
    heads, d_k, d_v = shape
    query, output = leaves.get("query") or leaves.get("fused"), leaves.get("output")
    regrouped = any(cls.__name__ in REGROUPED for cls in type(attention).__mro__)
    regrouped = regrouped or getattr(attention, "query_stride", 1) != 1  # Hiera pools queries at the end of a stage
    if not (heads and query and output) or regrouped or is_bypassed(model, query) or is_bypassed(model, output):
        return {}
    d, width = cast(tuple[int, int], leaf_size(model.get_submodule(query)))
    d_out, _ = cast(tuple[int, int], leaf_size(model.get_submodule(output)))
    groups = d_out // (heads * d_v)
    rows = query_rows(attention, width, shape, groups, fused="query" not in leaves)
    n_rows = width if rows is None else len(rows)
    if not groups or n_rows != groups * heads * d_k or d_out != groups * heads * d_v:
        return {}
    return {"query": query, "d_query": d, "query_rows": rows, "output": output}


def query_rows(
    attention: nn.Module, width: int, shape: tuple[int, int, int], groups: int, fused: bool
) -> Tensor | None:
    """The rows of the queries in the leaf's output; None for all."""
    heads, d_k, _ = shape
    if fused:
        return fused_rows(attention, width, shape)["query"].clone()
    if width == 2 * groups * heads * d_k:  # head by head a query and a gate (Qwen3-Next)
        return torch.arange(width, device="cpu").view(-1, 2, d_k)[:, 0].flatten()
    return None
