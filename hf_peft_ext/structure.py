"""Reads a model's structure: its stacks of blocks, its attention modules, linear leaves and norms.

What the module tree cannot tell stands in the tables at the top.
"""

import inspect
import sys
from collections.abc import Iterable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import match_target_against_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# What a leaf of an attention module does, by its name.
ROLES = {
    "query": {"q", "query", "q_proj", "q_lin", "q_attn", "wq", "to_q", "query_proj", "q_b_proj"},
    "key": {"k", "key", "k_proj", "k_lin", "wk", "to_k", "key_proj"},
    "value": {"v", "value", "v_proj", "v_lin", "wv", "to_v", "value_proj"},
    "fused": {"c_attn", "wqkv", "qkv", "qkv_proj", "query_key_value"},
    "output": {"o", "o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo", "to_out", "proj"},
}
# The leaf of a gated feed-forward network that carries the gate, by its name.
FFN_GATES = {"gate_proj", "wi_0", "w1"}
# Fused projections whose rows go head by head (query, key, value of one head, then of the next). All others are taken
# to hold all queries, then all keys, then all values.
FUSED_BY_HEAD = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"}
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of blocks that have attention somewhere, encoder before decoder."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and any(is_attention(m) for m in module.modules()):
            found.append(name)
            yield name, module


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of all blocks; a block's place in the list is its layer index."""
    return [f"{name}.{index}" for name, stack in stacks(model) for index in range(len(stack))]


def layer_of(path: str, layers: list[str]) -> int | None:
    return next((i for i, layer in enumerate(layers) if covers((layer,), path)), None)


def leaf_size(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear leaf, quantised or not, wrapped by a tuner or not; None for other modules."""
    module = innermost(module)
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    for d_in, d_out in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if hasattr(module, d_in) and hasattr(module, d_out):
            return getattr(module, d_in), getattr(module, d_out)
    return None


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1


def is_attention(module: nn.Module) -> bool:
    """An attention module owns a fused projection, or a query and a value."""
    roles = attention_leaves(module)
    return "fused" in roles or {"query", "value"} <= roles.keys()


def attention_leaves(module: nn.Module) -> dict[str, str]:
    """Role -> name of the linear leaves directly in an attention module."""
    leaves = [name for name, child in module.named_children() if leaf_size(child)]
    return {role: name for role, names in ROLES.items() for name in leaves if name.lower() in names}


def innermost(module: nn.Module) -> nn.Module:
    """The module inside the tuners that have wrapped it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def own_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """named_modules, without what tuners have put in."""
    yield prefix, model
    if isinstance(model, BaseTunerLayer):
        return
    for name, child in model.named_children():
        if not (isinstance(child, BaseTunerLayer) and not hasattr(child, "base_layer")):
            yield from own_modules(child, f"{prefix}.{name}" if prefix else name)


def has_final_norm(model: nn.Module, stack: str) -> bool:
    """Whether a norm stands beside the stack or above it. A stack without one normalises after each residual."""
    backbone = getattr(model, "base_model_prefix", None)  # above it is the head, which may have a norm of its own
    while stack and stack != backbone:
        stack = stack.rpartition(".")[0]
        children = model.get_submodule(stack).named_children()
        if any(is_norm(child) and "emb" not in name for name, child in children):
            return True
    return False


def covers(roots: tuple[str, ...], name: str) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def is_cross(path: str) -> bool:
    """Whether an attention module, by its path in the block, is cross-attention."""
    return any(word in path.lower() for word in ("cross", "encdec", "encoder_attn"))


def takes_prefix(attention: nn.Module) -> bool:
    """Whether the module hands its keys and values to transformers' AttentionInterface, keywords included."""
    source = sys.modules[type(attention).__module__]
    kinds = {p.kind for p in inspect.signature(attention.forward).parameters.values()}
    interface = hasattr(source, "ALL_ATTENTION_FUNCTIONS") and hasattr(source, "eager_attention_forward")
    return interface and inspect.Parameter.VAR_KEYWORD in kinds and hasattr(attention, "config")


def key_shape(attention: nn.Module, sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Number of key and value heads, and the width of one; (0, 0) if unknown."""
    owners = (attention, getattr(attention, "config", None))
    d_k = next((d for owner in owners for name in HEAD_WIDTHS if (d := getattr(owner, name, None))), None)
    if d_k is None:
        return 0, 0
    if "key" in sizes:
        return sizes["key"][1] // d_k, d_k
    if "fused" in sizes and "output" in sizes:
        queries = 0 if "query" in sizes else sizes["output"][0]
        return (sizes["fused"][1] - queries) // (2 * d_k), d_k
    return 0, 0


def matches(pattern: str | Iterable[str], path: str) -> bool:
    """peft's rule for `target_modules`: a string must match the whole path, a list names endings."""
    if isinstance(pattern, str):
        return match_target_against_key(pattern, path) is not None
    return any(path == ending or path.endswith(f".{ending}") for ending in pattern)
