"""Finds the modules of a model that sub-layers read and change.

A transformer is one or more stacks of blocks; a block has attention modules, with their query, key, value and output
leaves, and a feed-forward network with input and output leaves. `find_sites` says where each of these is.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .patterns import SECONDS, matching
from .structure import (
    FFN_GATES,
    attention_leaves,
    covers,
    fused_rows,
    has_final_norm,
    innermost,
    is_attention,
    is_causal,
    is_cross,
    is_norm,
    key_shape,
    layer_of,
    layer_paths,
    leaf_size,
    own_modules,
    prefix_act,
)

Act = Literal["input", "output", "norm", "span", "attention", "cache"]


@dataclass(frozen=True)
class Site:
    """A place in a model where a sub-layer can sit.

    Args:
        name: name of the site, as in `Placement.site`; cross-attention's begin with `cross_`.
        layer: index of the layer, encoder before decoder; None outside the blocks.
        host: path of the module whose call is changed.
        act: what is read and changed: the host's input and output ("input"), its output alone ("output"), a norm's
            input through its output ("norm"), the input of `reads` and the output of the host ("span"), or the keys
            and values inside the host, through AttentionInterface ("attention") or through the cache ("cache").
        d_in, d_out: widths of what is read and of what is added.
        causal: whether the tokens of this layer must not see later ones.
        attention: path of the attention module whose mask is over the tokens read here; "" outside the blocks.
        reads: path of the module whose input is read, for "span"; of the one that runs in front of it, for "norm".
        of_encoder: whether the tokens read here are the encoder's, as in the keys of cross-attention.
        rows, width: in a fused projection the rows of this site, out of `width`.
        heads, d_k, d_v: shape of keys and values, for "attention" and "cache".
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
    of_encoder: bool = False
    rows: Tensor | None = None
    width: int = 0
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
        overrides: site name -> modules, as peft's `target_modules` names them (a regular expression for the whole
            path, or a list of endings).

    Raises:
        ValueError: no module matches, or what matches cannot be such a site.
    """
    layers, modules = layer_paths(model), dict(own_modules(model))
    until = time.process_time() + SECONDS
    for name, pattern in overrides.items():
        hosts = matching(pattern, filter(None, modules), until)
        if not hosts:
            raise ValueError(f"`sites` (={{{name!r}: {pattern!r}}}) matches no module of {type(model).__name__}.")
        kept = [site for site in sites if not site.serves(name)]
        sites = kept + [user_site(name, path, modules, layer_of(path, layers), sites) for path in hosts]
    return sites


def user_site(name: str, path: str, modules: dict[str, nn.Module], layer: int | None, sites: list[Site]) -> Site:
    """The site `name` at the module `path`, with what is known of its layer."""
    module: Any = modules[path]
    if layer is None:
        layer = next((int(part) for part in path.split(".") if part.isdigit()), None)
    known = [site for site in sites if site.layer == layer and site.attention]
    near = next((site for site in known if site.host == path), known[0] if known else None)
    common: dict[str, Any] = {
        "layer": layer,
        "causal": near.causal if near else True,
        "attention": near.attention if near else "",
        "of_encoder": near.of_encoder if near else False,
    }
    if name.removeprefix("cross_") == "attention":
        return user_attention(name, path, module, common)
    sizes = [size for _, child in own_modules(module, path) if (size := leaf_size(child))]
    if is_norm(module):
        sizes = [(len(module.weight), len(module.weight))]
    if not sizes:
        raise ValueError(f"`sites` (={{{name!r}: ...}}) names {path}, which has no linear leaf to take widths from.")
    (d_in, _), (_, d_out) = sizes[0], sizes[-1]
    if name.startswith(("after_", "cross_after_", "bias")):
        act: Act = "norm" if name == "after_residual" and is_norm(module) else "output"
        return Site(name, host=path, act=act, d_in=d_out, d_out=d_out, **common)
    return Site(name, host=path, act="input", d_in=d_in, d_out=d_out, **common)


def user_attention(name: str, path: str, attention: nn.Module, common: dict[str, Any]) -> Site:
    leaves = {role: leaf_size(attention.get_submodule(leaf)) for role, leaf in attention_leaves(attention).items()}
    sizes = {role: size for role, size in leaves.items() if size}
    heads, d_k, d_v = key_shape(attention, sizes)
    act = prefix_act(attention)
    if not (act and heads):
        raise ValueError(f"`sites` (={{{name!r}: ...}}) names {path}, which takes no prefix: it does not use "
                         "transformers' AttentionInterface.")  # fmt: skip
    d = sizes["query" if "query" in sizes else "fused"][0]
    return Site(name, host=path, act=act, d_in=d, d_out=d, heads=heads, d_k=d_k, d_v=d_v, **common)


def bias_sites(model: nn.Module) -> Iterator[Site]:
    """The biases of the model below its head; where it has none, a place for one on each linear leaf of the blocks."""
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    start = next((name for name, module in model.named_modules() if module is backbone), "")
    layers = layer_paths(model)
    leaves = [(path, module) for path, module in own_modules(backbone, start) if leaf_size(module) or is_norm(module)]
    biases = {path: b for path, m in leaves if isinstance(b := getattr(innermost(m), "bias", None), nn.Parameter)}
    for path, module in leaves:
        size, layer = leaf_size(module), layer_of(path, layers)
        if path in biases:
            yield Site("bias", layer, path, "output", 0, biases[path].numel())
        elif not biases and size and layer is not None:
            yield Site("bias", layer, path, "output", 0, size[1])


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
        name, attention = next(
            (a for a in self.attentions if not is_cross(a[0][len(self.path) :])), self.attentions[0]
        )
        self.common |= {"causal": is_causal(attention), "attention": name}
        sites = [site for name, module in self.attentions for site in self.attention_sites(name, module)]
        return sites + list(self.ffn_sites()) + [self.residual_site()]

    def attention_sites(self, name: str, attention: nn.Module) -> Iterator[Site]:
        cross = "cross_" if is_cross(name[len(self.path) :]) else ""
        leaves = {role: f"{name}.{leaf}" for role, leaf in attention_leaves(attention).items()}
        if "output" not in leaves and (output := self.output_beside(name)):
            leaves["output"] = output
        for role in ("query", "key", "value"):
            if role in leaves:
                of_encoder = {"attention": name, "of_encoder": True} if cross and role != "query" else {}
                yield self.leaf_site(cross + role, leaves[role], **of_encoder)
        heads, d_k, d_v = shape = key_shape(attention, {role: self.size(leaf) for role, leaf in leaves.items()})
        fused = leaves.get("fused") or leaves.get("latent")
        if fused and heads:
            of_encoder = {"attention": name, "of_encoder": True} if cross and "query" in leaves else {}
            yield from self.fused_sites(cross, fused, attention, shape, **of_encoder)
        reads = leaves.get("fused") or leaves["query"]  # the query may read a latent, of another width than the module
        d = self.size(leaves["output"])[1] if "latent" in leaves else self.size(reads)[0]
        act = prefix_act(attention)
        if heads and (act == "attention" or (act == "cache" and not cross)):
            yield Site(f"{cross}attention", host=name, act=act, d_in=d, d_out=d, **self.common,
                       heads=heads, d_k=d_k, d_v=d_v)  # fmt: skip
        if "output" in leaves:
            d_out = self.size(leaves["output"])[1]
            yield self.leaf_site(f"{cross}attention_output", leaves["output"])
            yield Site(f"{cross}after_attention", host=leaves["output"], act="output", d_in=d_out, d_out=d_out,
                       **self.common)  # fmt: skip
            yield Site(f"{cross}parallel_attention", host=leaves["output"], act="span", d_in=d, d_out=d_out,
                       reads=name, **self.common)  # fmt: skip

    def fused_sites(
        self, cross: str, leaf: str, attention: nn.Module, shape: tuple[int, int, int], **kwargs: Any
    ) -> Iterator[Site]:
        d_in, width = self.size(leaf)
        for role, rows in fused_rows(attention, width, shape).items():
            if len(rows):
                yield Site(cross + role, host=leaf, act="input", d_in=d_in, d_out=len(rows),
                           rows=rows.clone(), width=width, **{**self.common, **kwargs})  # fmt: skip

    def ffn_sites(self) -> Iterator[Site]:
        parts = self.ffn_parts()
        leaves = self.linear_leaves(parts)
        d = self.size(self.output_leaf())[1]
        whole = self.linear_leaves([part for part in parts if self.is_whole(part, d)])
        found = whole or leaves
        for name in found:
            d_in, d_out = self.size(name)
            inner = d_in != d and (bool(whole) or d_in == self.size(leaves[0])[1])  # the width between the two
            if d_out == d and (inner or name == found[-1]):
                yield self.leaf_site("ffn_output", name)
            elif d_in == d:
                gate = name.rpartition(".")[2] in FFN_GATES
                yield self.leaf_site("ffn_gate" if gate else "ffn_input", name)
        if len(parts) == 1:
            host = parts[0]
            yield Site("parallel_ffn", host=host, act="input", d_in=d, d_out=d, **self.common)
        elif leaves and self.size(leaves[-1])[1] == d:
            host = leaves[-1]
            yield Site("parallel_ffn", host=host, act="span", reads=leaves[0], d_in=d, d_out=d, **self.common)
        else:
            return
        yield Site("after_ffn", host=host, act="output", d_in=d, d_out=d, **self.common)
        if norm := self.ffn_norm():
            yield Site("parallel_residual", host=host, act="span", reads=norm, d_in=d, d_out=d, **self.common)

    def residual_site(self) -> Site:
        d = self.size(self.output_leaf())[1]
        inside = tuple(self.root(name) for name, _ in self.attentions)
        norms = [name for name, module in self.modules.items() if is_norm(module) and not covers(inside, name)]
        if norms and not has_final_norm(self.model, self.path.rpartition(".")[0]):
            before = next((part for part in reversed(self.ffn_parts())), "")
            return Site("after_residual", host=norms[-1], act="norm", d_in=d, d_out=d, reads=before, **self.common)
        return Site("after_residual", host=self.path, act="output", d_in=d, d_out=d, **self.common)

    def ffn_norm(self) -> str | None:
        """The norm that reads the residual stream for the FFN: the last, where each branch has one in front of it."""
        attentions = tuple(name for name, _ in self.attentions)
        norms = [name for name, m in self.modules.items() if is_norm(m) and not covers(attentions, name)]
        before = has_final_norm(self.model, self.path.rpartition(".")[0]) and len(norms) == len(attentions) + 1
        return norms[-1] if before else None

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

    def is_whole(self, part: str, d: int) -> bool:
        """Whether a part leads from the residual stream back to it, and mixes no tokens: an FFN on its own."""
        sizes = [self.size(name) for name in self.linear_leaves([part])]
        there = any(a[0] == d == b[1] for i, a in enumerate(sizes) for b in sizes[i + 1 :])
        return there and not any(isinstance(m, nn.Conv1d) for m in self.modules[part].modules())

    def linear_leaves(self, parts: list[str]) -> list[str]:
        return [name for part in parts for name, m in own_modules(self.modules[part], part) if leaf_size(m)]

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

    def leaf_site(self, site: str, leaf: str, **kwargs: Any) -> Site:
        d_in, d_out = self.size(leaf)
        return Site(site, host=leaf, act="input", d_in=d_in, d_out=d_out, **{**self.common, **kwargs})

    def size(self, leaf: str) -> tuple[int, int]:
        size = leaf_size(self.modules[leaf])
        assert size is not None
        return size
