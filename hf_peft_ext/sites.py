"""Finds, by the structure of a model, the modules that sub-layers read and change.

A transformer is one or more stacks of blocks; a block has attention modules, with their query, key, value and output
leaves, and a feed-forward network with input and output leaves. `find_sites` walks the module tree and says where each
of these is. What the tree cannot tell stands in the tables at the top.
"""

import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
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

Act = Literal["input", "output", "norm", "span", "attention"]


@dataclass(frozen=True)
class Site:
    """A place in a model where a sub-layer can sit.

    Args:
        name: name of the site, as in `Placement.site`; cross-attention's begin with `cross_`.
        layer: index of the layer, encoder before decoder; None outside the blocks.
        host: path of the module whose call is changed.
        act: what is read and changed: the host's input and output ("input"), its output alone ("output"), a norm's
            input through its output ("norm"), the input of `reads` and the output of the host ("span"), or the keys
            and values inside the host ("attention").
        d_in, d_out: widths of what is read and of what is added.
        causal: whether the tokens of this layer must not see later ones.
        attention: path of the block's self-attention, which knows the padding; "" outside the blocks.
        reads: path of the module whose input is read, for "span".
        rows, width: in a fused projection the rows of this site, out of `width`.
        heads, d_k, d_v: shape of keys and values, for "attention".
    """

    name: str
    layer: int | None
    host: str
    act: Act
    d_in: int
    d_out: int
    causal: bool = False
    attention: str = ""
    reads: str = ""
    rows: Tensor | None = None
    width: int | None = None
    heads: int = 0
    d_k: int = 0
    d_v: int = 0

    def serves(self, site: str) -> bool:
        """Whether a placement at `site` means this one: "query" means "query" and "cross_query"."""
        return site in (self.name, self.name.removeprefix("cross_"))


def find_sites(model: nn.Module) -> list[Site]:
    """All sites of a model, layer by layer. Empty where no block with attention is found."""
    blocks = (BlockSites(model, path, layer) for layer, path in enumerate(layer_paths(model)))
    return [site for block in blocks for site in block.find()] + list(bias_sites(model))


def override_sites(model: nn.Module, sites: list[Site], overrides: dict[str, str | list[str]]) -> list[Site]:
    """The sites, with those named in `overrides` put where the user says.

    Args:
        overrides: site name -> modules, as peft's `target_modules` names them (a regular expression for the whole path,
            or a list of endings).

    Raises:
        ValueError: no module matches, or what matches cannot be such a site.
    """
    layers, modules = layer_paths(model), dict(own_modules(model))
    for name, pattern in overrides.items():
        hosts = [path for path in modules if path and matches(pattern, path)]
        if not hosts:
            raise ValueError(f"`sites` (={{{name!r}: {pattern!r}}}) matches no module of {type(model).__name__}.")
        kept = [site for site in sites if not site.serves(name)]
        sites = kept + [user_site(name, path, modules, layer_of(path, layers), sites) for path in hosts]
    return sites


def user_site(name: str, path: str, modules: dict[str, nn.Module], layer: int | None, sites: list[Site]) -> Site:
    """The site `name` at the module `path`, with what is known of its layer."""
    module = modules[path]
    if layer is None:
        layer = next((int(part) for part in path.split(".") if part.isdigit()), None)
    near = next((site for site in sites if site.layer == layer and site.attention), None)
    common = {"layer": layer, "causal": near.causal if near else True, "attention": near.attention if near else ""}
    if name.removeprefix("cross_") == "attention":
        leaves = {
            role: s for role, leaf in attention_leaves(module).items() if (s := leaf_size(modules[f"{path}.{leaf}"]))
        }
        heads, d_k = key_shape(module, leaves)
        if not (takes_prefix(module) and heads):
            raise ValueError(
                f"`sites` (={{{name!r}: ...}}) names {path}, which does not use transformers' AttentionInterface."
            )
        d = next(iter(leaves.values()))[0]
        return Site(name, host=path, act="attention", d_in=d, d_out=d, heads=heads, d_k=d_k, d_v=d_k, **common)
    sizes = [size for _, child in own_modules(module, path) if (size := leaf_size(child))]
    if is_norm(module):
        sizes = [module.weight.shape * 2]
    if not sizes:
        raise ValueError(f"`sites` (={{{name!r}: ...}}) names {path}, which has no linear leaf to take widths from.")
    (d_in, _), (_, d_out) = sizes[0], sizes[-1]
    if name.startswith(("after_", "cross_after_", "bias")):
        act: Act = "norm" if name == "after_residual" and is_norm(module) else "output"
        return Site(name, host=path, act=act, d_in=d_out, d_out=d_out, **common)
    return Site(name, host=path, act="input", d_in=d_in, d_out=d_out, **common)


def matches(pattern: str | Iterable[str], path: str) -> bool:
    """peft's rule for `target_modules`: a string must match the whole path, a list names endings."""
    if isinstance(pattern, str):
        return match_target_against_key(pattern, path) is not None
    return any(path == ending or path.endswith(f".{ending}") for ending in pattern)


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of blocks that have attention somewhere, encoder before decoder."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and any(is_attention(m) for m in module.modules()):
            found.append(name)
            yield name, module


def leaf_size(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear leaf, quantised or not, wrapped by a tuner or not; None for other modules."""
    module = unwrapped(module)
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


def unwrapped(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


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
    while stack:
        stack = stack.rpartition(".")[0]
        children = model.get_submodule(stack).named_children()
        if any(is_norm(child) and "emb" not in name for name, child in children):
            return True
    return False


def bias_sites(model: nn.Module) -> Iterator[Site]:
    """The biases of the model below its head; where it has none, a place for one on each linear leaf of the blocks."""
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    start = next((name for name, module in model.named_modules() if module is backbone), "")
    layers = layer_paths(model)
    leaves = [(path, module) for path, module in own_modules(backbone, start) if leaf_size(module) or is_norm(module)]
    biases = {path: b for path, m in leaves if isinstance(b := getattr(unwrapped(m), "bias", None), nn.Parameter)}
    for path, module in leaves:
        size, layer = leaf_size(module), layer_of(path, layers)
        if path in biases:
            yield Site("bias", layer, path, "output", 0, biases[path].numel())
        elif not biases and size and layer is not None:
            yield Site("bias", layer, path, "output", 0, size[1])


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of all blocks; a block's place in the list is its layer index."""
    return [f"{name}.{index}" for name, stack in stacks(model) for index in range(len(stack))]


def layer_of(path: str, layers: list[str]) -> int | None:
    return next((i for i, layer in enumerate(layers) if covers((layer,), path)), None)


class BlockSites:
    """The sites of one block."""

    def __init__(self, model: nn.Module, path: str, layer: int):
        self.model, self.path = model, path
        self.modules = dict(own_modules(model.get_submodule(path), path))
        self.attentions = [(name, module) for name, module in self.modules.items() if is_attention(module)]
        self.common: dict[str, Any] = {"layer": layer}

    def find(self) -> list[Site]:
        if not self.attentions:
            return []
        name, attention = next((a for a in self.attentions if not is_cross(a[0])), self.attentions[0])
        self.common |= {"causal": bool(getattr(attention, "is_causal", True)), "attention": name}
        sites = [site for name, module in self.attentions for site in self.attention_sites(name, module)]
        return sites + list(self.ffn_sites()) + [self.residual_site()]

    def attention_sites(self, name: str, attention: nn.Module) -> Iterator[Site]:
        cross = "cross_" if is_cross(name) else ""
        leaves = {role: f"{name}.{leaf}" for role, leaf in attention_leaves(attention).items()}
        if "output" not in leaves and (output := self.output_beside(name)):
            leaves["output"] = output
        for role in ("query", "key", "value"):
            if role in leaves:
                yield self.leaf_site(cross + role, leaves[role])
        heads, d_k = key_shape(attention, {role: self.size(leaf) for role, leaf in leaves.items()})
        if "fused" in leaves and heads:
            yield from self.fused_sites(cross, leaves["fused"], attention, heads, d_k)
        d = self.size(leaves.get("fused") or leaves["query"])[0]
        if takes_prefix(attention) and heads:
            d_v = self.size(leaves["value"])[1] // heads if "value" in leaves else d_k
            yield Site(f"{cross}attention", host=name, act="attention", d_in=d, d_out=d, **self.common,
                       heads=heads, d_k=d_k, d_v=d_v)  # fmt: skip
        if "output" in leaves:
            d_out = self.size(leaves["output"])[1]
            yield self.leaf_site(f"{cross}attention_output", leaves["output"])
            yield Site(f"{cross}after_attention", host=leaves["output"], act="output", d_in=d_out, d_out=d_out,
                       **self.common)  # fmt: skip
            yield Site(f"{cross}parallel_attention", host=leaves["output"], act="span", d_in=d, d_out=d_out,
                       reads=name, **self.common)  # fmt: skip

    def fused_sites(self, cross: str, leaf: str, attention: nn.Module, heads: int, d_k: int) -> Iterator[Site]:
        d_in, width = self.size(leaf)
        if getattr(attention, "config", None) and attention.config.model_type in FUSED_BY_HEAD:
            rows = torch.arange(width).view(heads, 3, d_k).transpose(0, 1).flatten(1)
        else:
            rows = torch.arange(width).split([width - 2 * heads * d_k, heads * d_k, heads * d_k])
        for role, part in zip(("query", "key", "value"), rows, strict=True):
            if len(part):
                yield Site(cross + role, host=leaf, act="input", d_in=d_in, d_out=len(part), **self.common,
                           rows=part.clone(), width=width)  # fmt: skip

    def ffn_sites(self) -> Iterator[Site]:
        parts = self.ffn_parts()
        leaves = [name for part in parts for name, m in own_modules(self.modules[part], part) if leaf_size(m)]
        d = self.size(self.output_leaf())[1]
        for name in leaves:
            d_in, d_out = self.size(name)
            if name == leaves[-1] and d_out == d:
                yield self.leaf_site("ffn_output", name)
            elif d_in == d:
                gate = name.rpartition(".")[2] in FFN_GATES
                yield self.leaf_site("ffn_gate" if gate else "ffn_input", name)
        if len(parts) == 1:
            for site, act in (("after_ffn", "output"), ("parallel_ffn", "input")):
                yield Site(site, host=parts[0], act=act, d_in=d, d_out=d, **self.common)
        elif leaves and self.size(leaves[-1])[1] == d:
            yield Site("after_ffn", host=leaves[-1], act="output", d_in=d, d_out=d, **self.common)
            yield Site("parallel_ffn", host=leaves[-1], act="span", reads=leaves[0], d_in=d, d_out=d, **self.common)

    def residual_site(self) -> Site:
        d = self.size(self.output_leaf())[1]
        norms = [name for name, module in self.modules.items() if is_norm(module)]
        if norms and not has_final_norm(self.model, self.path.rpartition(".")[0]):
            return Site("after_residual", host=norms[-1], act="norm", d_in=d, d_out=d, **self.common)
        return Site("after_residual", host=self.path, act="output", d_in=d, d_out=d, **self.common)

    def ffn_parts(self) -> list[str]:
        """The largest modules outside attention that hold a weight matrix and no norm."""
        attention_roots = tuple(self.root(name) for name, _ in self.attentions)
        parts: list[str] = []
        for name, module in self.modules.items():
            if name == self.path or isinstance(module, nn.ModuleList) or covers(attention_roots, name):
                continue
            if covers(tuple(parts), name) or any(covers((name,), root) for root in attention_roots):
                continue
            has_matrix = any(p.ndim > 1 for p in module.parameters()) or leaf_size(module)
            if has_matrix and not any(is_norm(m) for m in module.modules()):
                parts.append(name)
        return parts

    def root(self, name: str) -> str:
        """The highest module of the block, below lists, that holds this attention module."""
        while (parent := name.rpartition(".")[0]) != self.path and not isinstance(
            self.model.get_submodule(parent), nn.ModuleList
        ):
            name = parent
        return name

    def output_beside(self, attention: str) -> str | None:
        """The output leaf that stands beside an attention module (BERT's `attention.output.dense`)."""
        root = self.root(attention)
        outside = (n for n, m in own_modules(self.modules[root], root) if leaf_size(m) and not covers((attention,), n))
        return next(outside, None)

    def output_leaf(self) -> str:
        """A leaf whose output has the width of the residual stream."""
        name, attention = self.attentions[0]
        leaf = attention_leaves(attention).get("output")
        return f"{name}.{leaf}" if leaf else self.output_beside(name) or self.ffn_parts()[-1]

    def leaf_site(self, site: str, leaf: str) -> Site:
        d_in, d_out = self.size(leaf)
        return Site(site, host=leaf, act="input", d_in=d_in, d_out=d_out, **self.common)

    def size(self, leaf: str) -> tuple[int, int]:
        size = leaf_size(self.modules[leaf])
        assert size is not None
        return size


def covers(roots: tuple[str, ...], name: str) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def is_cross(path: str) -> bool:
    """Whether an attention module, by its path in the block, is cross-attention."""
    last = path.rpartition(".layers.")[2].lower()
    return "cross" in last or "encdec" in last or "encoder_attn" in last


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
