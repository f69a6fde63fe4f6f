"""Reads a model's structure: its stacks of blocks, its attention modules, linear leaves and norms.

The tables at the top hold what the module tree does not show.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Literal, TypeGuard

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.calls import code_of, parameters

# The role of a leaf of an attention module, by its name.
LEAF_ROLES = {
    "query": {"q", "query", "q_proj", "q_lin", "q_attn", "wq", "to_q", "query_proj", "q_b_proj",
              "project_q", "q_head", "linear_q", "projection_query"},
    "key": {"k", "key", "k_proj", "k_lin", "wk", "to_k", "key_proj", "project_k", "k_head", "linear_k",
            "projection_key"},
    "value": {"v", "value", "v_proj", "v_lin", "wv", "to_v", "value_proj", "project_v", "v_head", "linear_v",
              "projection_value"},
    "fused": {"c_attn", "wqkv", "qkv", "qkv_proj", "query_key_value"},
    "latent": {"kv_b_proj"},
    "output": {"o", "o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo", "to_out", "proj", "attention_out",
               "post_proj", "projection", "projection_layer", "output_proj", "linear_out", "output"},
}  # fmt: skip
# The leaf of a gated feed-forward network that carries the gate, by its name.
FFN_GATES = {"gate_proj", "wi_0", "w1"}
# Attention whose mask depends on the name of the kernel, which a prefix changes, or has another kind of mask.
WITHOUT_PREFIX = {"minimax_m3_vl", "glm5_next", "mpt", "xlm", "flaubert", "reformer", "prophetnet"}
# Architectures whose attention does not show which tokens of the layer are padding: its masks have a meaning or
# shape of their own, it is replaced during a forward (BigBird), or it runs twice in one.
UNREAD_MASKS = {
    *("big_bird", "bigbird_pegasus", "canine", "cpmant", "dory", "fsmt", "funnel", "git", "hrm_text", "led"),
    *("longformer", "longt5", "mpt", "openai", "pegasus_x", "prophetnet"),
}
# Architectures whose blocks return a list, several streams, or a tensor of another width than the norms inside have.
WITHOUT_BLOCK_OUTPUT = {"hy_v4", "mobilebert", "openai"}
# Norms whose channels are the second axis, not the last.
WITHOUT_FEATURES = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
# Names of the cache argument of a forward: "cache" since transformers 5.24, "past_key_values" before.
CACHES = ("cache", "past_key_values", "layer_past")
# Names of the argument for a mixer's state.
STATES = (*CACHES, "cache_params", "state")
# Names in the code of softmax attention.
SOFTMAX = {"ALL_ATTENTION_FUNCTIONS", "softmax", "Softmax", "scaled_dot_product_attention"}


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The lists of blocks, as (path, list), encoder before decoder.

    They are the outermost lists with attention in some block, or with a norm in all blocks and a mixer with a state in
    some (Mamba, RWKV). For a list of stages they are the stages' own lists.
    """
    outermost: list[str] = []
    for name, module in model.named_modules():
        if not is_list(module) or any(name.startswith(f"{outer}.") for outer in outermost):
            continue
        if (has_attention(module) and not of_stacks(module)) or is_recurrent(module):
            outermost.append(name)
            yield name, module


def is_list(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    """Whether a module is a list of modules, or runs a list of blocks with attention in turn (CvT)."""
    in_turn = isinstance(module, nn.Sequential) and len(module) > 0 and all(map(has_attention, module))
    return in_turn or isinstance(module, nn.ModuleList)


def has_attention(module: nn.Module) -> bool:
    """Whether a module contains an attention module."""
    return any(is_attention(m) for m in module.modules())


def is_recurrent(stack: nn.ModuleList | nn.Sequential) -> bool:
    """Whether the blocks of a list mix tokens only through a state."""
    mixes = any(takes_state(m) and is_mixer(m) for m in stack.modules() if not isinstance(m, nn.ModuleList))
    return mixes and not has_attention(stack) and all(any(map(is_norm, block.modules())) for block in stack)


def of_stacks(stack: nn.ModuleList | nn.Sequential) -> bool:
    """Whether all blocks with attention are stages with lists of their own, as in ALBERT's groups and Swin's stages.

    Between them may be stages of convolutions, as in MobileViT.
    """
    return all(is_stage(block) for block in stack if has_attention(block))


def is_stage(block: nn.Module) -> bool:
    """Whether all attention of a block is inside lists of blocks of one class, each of which has attention."""
    lists = [m for m in block.modules() if is_list(m) and len(m)]
    inner = [
        m for m in lists if all(map(has_attention, m)) and len({type(b) for b in m}) == 1 and not is_attention(m[0])
    ]
    inside = {id(m) for stack in inner for m in stack.modules()}
    attentions = [m for m in block.modules() if is_attention(m)]
    return bool(attentions) and all(id(m) in inside for m in attentions)


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of all blocks; a block's index in the list is its layer index."""
    return [f"{name}.{index}" for name, stack in stacks(model) for index in range(len(stack))]


def layer_of(path: str, layers: list[str]) -> int | None:
    """The layer index of a module, from `layer_paths`; None outside the blocks."""
    return next((i for i, layer in enumerate(layers) if covers((layer,), path)), None)


def leaf_size(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear leaf, also a quantized one or one in a tuner layer; None for other modules."""
    module = innermost(module)
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    for d_in, d_out in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if hasattr(module, d_in) and hasattr(module, d_out):
            return getattr(module, d_in), getattr(module, d_out)
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises the features of each token, along the last axis."""
    if isinstance(module, BaseTunerLayer):  # an adapter at a norm exposes the norm's weight
        return False
    weight = getattr(module, "weight", None)
    if isinstance(module, WITHOUT_FEATURES) or getattr(module, "data_format", "") == "channels_first":
        return False
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1


def is_attention(module: nn.Module) -> bool:
    """An attention module owns a fused projection, or a query and a value, or a query and the latent of both."""
    roles = attention_leaves(module)
    return "fused" in roles or ("query" in roles and ("value" in roles or "latent" in roles))


def is_mixer(module: nn.Module) -> bool:
    """Whether a module mixes tokens by other means than softmax attention: linear attention, a state space, a short
    convolution. It owns linear leaves, and a convolution along time or an argument for its state.
    """
    if not any(leaf_size(child) for child in module.children()):
        return False
    stateful = takes_state(module) or any(isinstance(child, nn.Conv1d) for child in module.children())
    return stateful and not (is_attention(module) and attends(module))


def takes_state(module: nn.Module) -> bool:
    """Whether the forward of a module has an argument for a cache or a state."""
    return not parameters(module).isdisjoint(STATES)


def is_bypassed(model: nn.Module, leaf: str) -> bool:
    """Whether a leaf may never be called: its owner reads its weight instead, is a mixer with kernels that do, or
    runs one module of the list with the leaf, which one the code does not tell.
    """
    path, _, name = leaf.rpartition(".")
    owner = model.get_submodule(path)
    code = code_of(type(owner))
    return is_picked(model, leaf) or (name in code.read and (name not in code.called or is_mixer(owner)))


def is_picked(model: nn.Module, path: str) -> bool:
    """Whether a module is part of a list from which a forward picks one module, as Zamba2's adapters are."""
    while "." in path:
        path, _, name = path.rpartition(".")
        if name in code_of(type(model.get_submodule(path))).picked:
            return True
    return False


def attends(attention: nn.Module) -> bool:
    """Whether an attention module computes a softmax over keys, unless its code shows that it does not."""
    words = code_of(type(attention)).words
    return not (takes_state(attention) and words and not words & SOFTMAX)


def attention_leaves(module: nn.Module) -> dict[str, str]:
    """Role -> name of the linear leaves directly in an attention module."""
    sizes = {name: size for name, child in module.named_children() if (size := leaf_size(child))}
    leaves = {role: name for role, names in LEAF_ROLES.items() for name in sizes if name.lower() in names}
    d_in, d_out = sizes.get("in_proj", (0, 0))
    if d_out and d_out == 3 * d_in and not takes_state(module):  # in a mixer the name has another meaning
        leaves["fused"] = "in_proj"
    return leaves


def role_sizes(attention: nn.Module) -> dict[str, tuple[int, int]]:
    """Role -> (d_in, d_out) of the linear leaves directly in an attention module."""
    sizes = {role: leaf_size(attention.get_submodule(leaf)) for role, leaf in attention_leaves(attention).items()}
    return {role: size for role, size in sizes.items() if size}


def innermost(module: nn.Module) -> nn.Module:
    """The module inside any tuner layers around it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def has_final_norm(model: nn.Module, stack: str) -> bool:
    """Whether a norm follows the stack. A stack without one normalises after each residual."""
    backbone = getattr(model, "base_model_prefix", None)  # above it is the head, which may have a norm of its own
    while stack and stack != backbone:
        stack = stack.rpartition(".")[0]
        children = model.get_submodule(stack).named_children()
        if any(is_norm(child) and "emb" not in name for name, child in children):
            return True
    return False


def covers(roots: tuple[str, ...], name: str) -> bool:
    """Whether a path is one of these paths or inside one of them."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def is_of(module: nn.Module, families: set[str]) -> bool:
    """Whether a module's class, or one that it inherits from, is of these architectures: "bloom" for
    transformers.models.bloom.modeling_bloom.
    """
    return any(cls.__module__.rpartition("modeling_")[2] in families for cls in type(module).__mro__)


def is_cross(path: str) -> bool:
    """Whether an attention module, by its path in the block, is cross-attention."""
    return any(word in path.lower() for word in ("cross", "encdec", "encoder_attn"))


def expert_tensors(module: nn.Module) -> list[str]:
    """Names of the parameters of a module that hold one matrix for each expert of a mixture, in one tensor."""
    if "conv" in type(module).__name__.lower():
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, parameter in own if parameter.ndim == 3 and min(parameter.shape) > 1]


def source_of(module: nn.Module) -> ModuleType | None:
    """The Python module that defines the forward of a module."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return sys.modules.get(owner.__module__)


def prefix_act(attention: nn.Module) -> Literal["attention", "cache"] | None:
    """How a prefix enters an attention module; None if it cannot.

    Through transformers' AttentionInterface, if the module passes its keys, values and keywords to it, or else through
    its cache.
    """
    source, parameters = source_of(attention), inspect.signature(attention.forward).parameters
    if is_of(attention, WITHOUT_PREFIX):
        return None
    if hasattr(source, "ALL_ATTENTION_FUNCTIONS") and hasattr(source, "eager_attention_forward"):
        takes_keywords = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        return "attention" if takes_keywords and hasattr(attention, "config") else None
    forward = inspect.unwrap(type(attention).forward)
    updates = "update" in getattr(getattr(forward, "__code__", None), "co_names", ())
    return "cache" if updates and any(name in parameters for name in CACHES) else None


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments (or the outputs) of a forward, under any of its names; None if there is none."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def in_decoder(model: nn.Module, path: str) -> bool:
    """Whether a block is one of a decoder, which sees no later tokens, whatever its attention module says of itself.

    Some (BigBird-Pegasus, NLLB-MoE, T5Gemma 2) say that they are not causal, and are given a mask that is.
    """
    config = getattr(model, "config", None)
    decodes = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    return bool(decodes) and "decoder" in path.split(".")


def is_causal(attention: nn.Module) -> bool:
    """Whether tokens must not see later ones. True where the module does not say, so that no gate looks ahead."""
    bidirectional = prefix_act(attention) == "cache" and getattr(attention, "is_decoder", True) is False
    return bool(getattr(attention, "is_causal", not bidirectional))
