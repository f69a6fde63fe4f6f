"""Finds the modules of a model that sub-layers read and change.

A transformer is one or more stacks of blocks; a block has attention modules, with their query, key, value and output
leaves, and a feed-forward network with input and output leaves. `find_sites` returns the place of each.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_peft_ext.model.attention_shape import key_shape
from hf_peft_ext.model.block_sites import BlockSites
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.site import Act, Site
from hf_peft_ext.model.structure import (
    attention_leaves,
    innermost,
    is_bypassed,
    is_norm,
    layer_of,
    layer_paths,
    leaf_size,
    prefix_act,
    role_sizes,
)
from hf_peft_ext.validation.module_patterns import PATTERN_SECONDS, matching


def find_sites(model: nn.Module) -> list[Site]:
    """All sites of a model, layer by layer; empty where no stack of blocks is found.

    A layer may have no attention. Some layers of hybrid models, and all of Mamba and RWKV, have another mixer (linear
    attention, a state space, a short convolution); Nemotron-H has layers with an FFN alone. In such a layer

    - "after_attention" and "parallel_attention" are after the mixer and beside it;
    - "query", "key" and "value" exist where the mixer has separate leaves for them; else "mixer_input" is its widest
      projection of the hidden states (Mamba's `in_proj`, Qwen3-Next's `in_proj_qkvz`);
    - "attention", the site of prefixes, does not exist.

    Leaves that may never be called are no sites: those whose weight a kernel reads (Mamba's `dt_proj`), and those in a
    list from which the forward picks one module (the adapters in Zamba2's blocks). A module that several layers share
    (Zamba) has the same host in all of them.
    """
    blocks = (BlockSites(model, path, layer) for layer, path in enumerate(layer_paths(model)))
    sites = [site for block in blocks for site in block.find()] + list(bias_sites(model))
    first = {path: path for path, _ in model.named_modules()}  # each module once, by its first path
    path_of = {id(module): path for path, module in model.named_modules()}

    def first_path(path: str) -> str:
        return path if path in first or not path else path_of[id(model.get_submodule(path))]

    moved = ({name: first_path(getattr(site, name)) for name in ("host", "query", "output")} for site in sites)
    return [replace(site, **paths) for site, paths in zip(sites, moved, strict=True)]


def override_sites(model: nn.Module, sites: list[Site], overrides: dict[str, str | list[str]]) -> list[Site]:
    """The sites, with those named in `overrides` at the modules that the user names.

    Args:
        model: the model.
        sites: from `find_sites`.
        overrides: site name -> modules, as peft's `target_modules` names them (a regular expression for the whole
            path, or a list of endings).

    Raises:
        ValueError: no module matches, or one that matches cannot be such a site.
    """
    layers, modules = layer_paths(model), dict(own_modules(model))
    until = time.process_time() + PATTERN_SECONDS
    for name, pattern in overrides.items():
        hosts = matching(pattern, filter(None, modules), until)
        if not hosts:
            raise ValueError(f"`sites` (={{{name!r}: {pattern!r}}}) matches no module of {type(model).__name__}.")
        kept = [site for site in sites if not site.serves(name)]
        sites = kept + [user_site(name, path, modules, layer_of(path, layers), sites) for path in hosts]
    return sites


def user_site(name: str, path: str, modules: dict[str, nn.Module], layer: int | None, sites: list[Site]) -> Site:
    """The site `name` at the module `path`, with the properties of its layer's other sites.

    Args:
        name: name of the site.
        path: the module.
        modules: path -> module, of the model.
        layer: index of the layer; None to take the first number in the path.
        sites: the other sites of the model.

    Raises:
        ValueError: the module cannot be such a site.
    """
    module: Any = modules[path]
    if layer is None:
        layer = next((int(part) for part in path.split(".") if part.isdigit()), None)
    nearby = [site for site in sites if site.layer == layer and site.attention]
    near = next((site for site in nearby if site.host == path), nearby[0] if nearby else None)
    common: dict[str, Any] = {
        "layer": layer,
        "causal": near.causal if near else True,
        "attention": near.attention if near else "",
        "of_encoder": near.of_encoder if near else False,
    }
    if name.removeprefix("cross_") == "attention":
        return user_attention(name, path, module, common)
    sizes = [size for _, child in own_modules(module, path) if (size := leaf_size(child))]
    if name == "embeddings":
        sizes = [embeddings_width(module, sites)]
    elif is_norm(module):
        sizes = [(len(module.weight), len(module.weight))]
    if not sizes:
        raise ValueError(f"`sites` (={{{name!r}: ...}}) names {path}, which has no linear leaf to take widths from.")
    (d_in, _), (_, d_out) = sizes[0], sizes[-1]
    if name.startswith(("after_", "cross_after_", "bias", "embeddings")):
        act: Act = "norm" if name == "after_residual" and is_norm(module) else "output"
        return Site(name, host=path, act=act, d_in=d_out, d_out=d_out, **common)
    return Site(name, host=path, act="input", d_in=d_in, d_out=d_out, **common)


def embeddings_width(module: nn.Module, sites: list[Site]) -> tuple[int, int]:
    """The width of embeddings: that of a norm or of a table in the module, else of the residual stream."""
    tables = (m for _, m in own_modules(module) if is_norm(m) or isinstance(m, nn.Embedding))
    weights: list[Any] = [m.weight for m in tables]
    width: int = (
        weights[-1].shape[-1] if weights else next(site.d_out for site in sites if site.name == "after_residual")
    )
    return width, width


def user_attention(name: str, path: str, attention: nn.Module, common: dict[str, Any]) -> Site:
    """The site of prefixes at the attention module `path`.

    Raises:
        ValueError: the module takes no prefix.
    """
    sizes = role_sizes(attention)
    heads, d_k, d_v = key_shape(attention, sizes)
    act, leaves = prefix_act(attention) or "leaves", attention_leaves(attention)
    ends: dict[str, Any] = {}
    if heads and {"query", "output"} <= leaves.keys():
        ends = {role: f"{path}.{leaves[role]}" for role in ("query", "output")}
        ends["d_query"] = sizes["query"][0]
    if not heads or (act == "leaves" and not ends):
        raise ValueError(f"`sites` (={{{name!r}: ...}}) names {path}, which takes no prefix: it neither uses "
                         "transformers' AttentionInterface nor has a query and an output leaf.")  # fmt: skip
    d = sizes["query" if "query" in sizes else "fused"][0]
    return Site(name, host=path, act=act, d_in=d, d_out=d, heads=heads, d_k=d_k, d_v=d_v, **ends, **common)


def bias_sites(model: nn.Module) -> Iterator[Site]:
    """The biases of the model below its head; where a stack of blocks has none, a place for one on each linear leaf.

    Leaves that may never be called are left out.
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    start = next((name for name, module in model.named_modules() if module is backbone), "")
    layers = layer_paths(model)
    leaves = [(path, module) for path, module in own_modules(backbone, start) if leaf_size(module) or is_norm(module)]
    leaves = [(path, module) for path, module in leaves if path == start or not is_bypassed(model, path)]
    biases = {path: b for path, m in leaves if isinstance(b := getattr(innermost(m), "bias", None), nn.Parameter)}
    with_biases = {stack_of(layers[layer]) for path in biases if (layer := layer_of(path, layers)) is not None}
    for path, module in leaves:
        size, layer = leaf_size(module), layer_of(path, layers)
        if path in biases:
            yield Site("bias", layer, path, "output", 0, biases[path].numel())
        elif size and layer is not None and stack_of(layers[layer]) not in with_biases:
            yield Site("bias", layer, path, "output", 0, size[1])


def stack_of(layer: str) -> str:
    """Path of the list that holds a block, from the block's path."""
    return layer.rpartition(".")[0]


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The input embeddings of a model; BART's wrapper of its decoder does not pass them on."""
    for _, module in own_modules(model):
        if isinstance(module, PreTrainedModel):
            try:
                return innermost(module.get_input_embeddings())
            except NotImplementedError:
                continue
    return None
