"""The shape of an attention module's projections: heads, widths, and the rows of fused projections."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_peft_ext.model.structure import attention_leaves, is_of

# Fused projections whose rows are stored group by group: the queries that share a key, that key, its value. The others
# store all queries, then all keys, then all values.
FUSED_BY_GROUP = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "falcon", "gpt_bigcode", "deberta"}
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_head", "dim_head")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


def key_shape(attention: nn.Module, sizes: dict[str, tuple[int, int]]) -> tuple[int, int, int]:
    """Number of key and value heads, and the widths of a key and of a value; (0, 0, 0) if unknown.

    Args:
        attention: the module.
        sizes: role -> (d_in, d_out) of the module's leaves, and of its output leaf, which may be beside it.
    """
    if "latent" in sizes:
        d_nope, d_rope, d_v = (attribute_width(attention, f"{n}_head_dim") for n in ("qk_nope", "qk_rope", "v"))
        return (sizes["latent"][1] // (d_nope + d_v), d_nope + d_rope, d_v) if d_nope and d_v else (0, 0, 0)
    d_k = attribute_width(attention, *HEAD_WIDTHS)
    if not d_k and "output" in sizes and (count := attribute_width(attention, *HEAD_COUNTS)):
        d_k = sizes["output"][0] // count
    if "key" in sizes and "value" in sizes and d_k:
        heads = sizes["key"][1] // d_k
        return (heads, d_k, sizes["value"][1] // heads) if heads else (0, 0, 0)
    if "fused" in sizes and "output" in sizes and d_k:
        queries = 0 if "query" in sizes else sizes["output"][0]
        return (sizes["fused"][1] - queries) // (2 * d_k), d_k, d_k
    return 0, 0, 0


def attribute_width(attention: nn.Module, *names: str) -> int:
    """The first of these numbers among the attributes of the module or its config; 0 if there is none."""
    owners = (attention, getattr(attention, "config", None))
    widths = (getattr(owner, name, None) for owner in owners for name in names)
    return next((d for d in widths if isinstance(d, int) and d), 0)  # a config of stages has lists


def fused_rows(attention: Any, d_out: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Role -> the indices of its rows in a fused projection.

    Args:
        attention: the attention module.
        d_out: width of the projection.
        shape: number of key and value heads, and the widths of a key and of a value.
    """
    heads, d_k, d_v = shape
    rows = torch.arange(d_out, device="cpu")  # also for models without data
    if "latent" in attention_leaves(attention):  # head by head, the part of the key without positions, and the value
        key, value = rows.view(heads, -1).split([d_out // heads - d_v, d_v], dim=1)
        return {"key": key.flatten(), "value": value.flatten()}
    if is_of(attention, {"codegen"}):  # four parts: queries, values, keys
        query, value, key = rows.view(4, 3, -1).unbind(1)
        return {"query": query.flatten(), "key": key.flatten(), "value": value.flatten()}
    if is_of(attention, FUSED_BY_GROUP):
        rows = rows.view(heads, -1, d_k)
        return {"query": rows[:, :-2].flatten(), "key": rows[:, -2].flatten(), "value": rows[:, -1].flatten()}
    query, key, value = rows.split([d_out - 2 * heads * d_k, heads * d_k, heads * d_k])
    return {"query": query, "key": key, "value": value}
