"""Which rows and columns of which weights belong together, so that a model can be cut without falling apart.

An *axis* is a set of units (channels, or heads of several channels) that runs through several weights: what is dropped
from one is dropped from all. The axes of a model, with the layer's index in front where each layer has its own:

    residual      the stream that every block reads and adds to; embeddings, norms and heads lie along it
    0.heads       query heads of layer 0: rows of the query projection, columns of the output projection
    0.kv_heads    its key and value heads; several queries may share one
    0.ffn         inner channels of the feed-forward network, gated or not
    0.head_dim    channels inside a head, kept whole wherever possible
    3.cross_heads, 3.cross_kv_heads, 3.cross_head_dim    the same for cross-attention
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.sites import Site, find_sites
from hf_peft_ext.model.structure import (
    innermost,
    is_attention,
    is_norm,
    layer_of,
    layer_paths,
    leaf_size,
    own_modules,
    stacks,
)
from hf_peft_ext.pruning.sizes import sizes_of

RESIDUAL = "residual"
# Linear leaves outside the blocks that lead from the stream to as many channels again: poolers, transforms of heads.
SQUARE_LEAVES = {"dense"}

Kept = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """Consecutive channels of a weight that lie along an axis, `d` channels to a unit.

    Args:
        axis: name of the axis.
        units: how many units it has.
        d: channels of a unit.
        inside: name of the axis inside a unit; "" where units are kept whole.
    """

    axis: str
    units: int
    d: int = 1
    inside: str = ""

    @property
    def channels(self) -> int:
        return self.units * self.d

    def index(self, kept: Kept) -> Tensor:
        """The kept channels, counted from the start of the run."""
        units = kept[self.axis]
        inside = kept[self.inside] if self.inside else torch.arange(self.d, device="cpu")
        return (units[:, None] * self.d + inside).flatten()


Dim = tuple[Run, ...]  # one dimension of a weight, run after run; () for one that is never cut


def index_of(dim: Dim, kept: Kept) -> Tensor | None:
    """The kept channels of a dimension, ascending; None where it is not cut."""
    starts = [sum(run.channels for run in dim[:i]) for i in range(len(dim))]
    return torch.cat([start + run.index(kept) for start, run in zip(starts, dim, strict=True)]) if dim else None


@dataclass(frozen=True)
class Weights:
    """The dimensions of a module's weight, by what they are to the module.

    Args:
        columns: along its input.
        rows: along its output, as are its bias and the scale of a norm.
        by_rows: whether the weight is stored as (rows, columns), as in `nn.Linear`, or the other way round.
        query: whether its first rows make queries.
    """

    columns: Dim
    rows: Dim
    by_rows: bool = True
    query: bool = False

    def dims(self, ndim: int) -> tuple[Dim, ...]:
        """The dimensions of a parameter of the module, as it is stored."""
        if ndim == 1:
            return (self.rows,)
        return (self.rows, self.columns) if self.by_rows else (self.columns, self.rows)


@dataclass
class Channels:
    """The axes of a model.

    Args:
        weights: path of a module with parameters -> their dimensions.
        sizes: axis -> its units.
        aligned: sets of attention modules, by the prefix of their axes ("0.", `3.cross_`), that must keep the same
            heads: T5 adds one position bias, with a value for each head, in all layers of a stack.
    """

    weights: dict[str, Weights] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    aligned: list[list[str]] = field(default_factory=list)


def find_channels(model: PreTrainedModel) -> Channels:
    """The axes of a model.

    Raises:
        ValueError: how to cut this architecture is not known, or it has a weight that lies along no known axis.
    """
    return ChannelFinder(model).find()


class ChannelFinder:
    """Sorts the weights of one model along its axes."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.sizes = model, sizes_of(model.config)
        self.layers = layer_paths(model)
        self.residual: Dim = (Run(RESIDUAL, self.sizes.width),)

    def find(self) -> Channels:
        found = Channels()
        for site in find_sites(self.model):
            if weights := self.of_site(site):
                # a fused projection has three sites and is one weight
                found.weights[site.host] = weights
        for path, module in own_modules(self.model):
            module = innermost(module)
            if path not in found.weights and list(module.parameters(recurse=False)):
                found.weights[path] = self.beside(path, module)
        runs = [run for w in found.weights.values() for dim in (w.rows, w.columns) for run in dim]
        found.sizes = {run.axis: run.units for run in runs} | {run.inside: run.d for run in runs if run.inside}
        found.aligned = list(self.aligned(found.sizes))
        return found

    def of_site(self, site: Site) -> Weights | None:
        """The dimensions of a linear leaf of a block."""
        cross = "cross_" if site.name.startswith("cross_") else ""
        prefix, d = f"{site.layer}.{cross}", self.sizes.head_dim
        heads: Dim = (Run(f"{prefix}heads", self.sizes.heads, d, f"{prefix}head_dim"),)
        kv: Dim = (Run(f"{prefix}kv_heads", self.sizes.kv_heads, d, f"{prefix}head_dim"),)
        ffn: Dim = (Run(f"{site.layer}.ffn", self.sizes.ffn),)
        fused = site.rows is not None
        by_site: dict[str, tuple[Dim, Dim]] = {
            "query": (self.residual, heads + kv + kv if fused else heads),
            "key": (self.residual, heads + kv + kv if fused else kv),
            "value": (self.residual, heads + kv + kv if fused else kv),
            "attention_output": (heads, self.residual),
            "ffn_input": (self.residual, ffn),
            "ffn_gate": (self.residual, ffn),
            "ffn_output": (ffn, self.residual),
        }
        name = site.name.removeprefix("cross_")
        if site.act != "input" or name not in by_site:
            return None
        module = innermost(self.model.get_submodule(site.host))
        query = name == "query" or fused
        weights = Weights(*by_site[name], by_rows=not isinstance(module, Conv1D), query=query)
        size = leaf_size(module)
        if size != (channels(weights.columns), channels(weights.rows)):
            self.refuse(site.host, f"maps {size}")
        if fused and not in_one_run(site):
            self.refuse(site.host, "makes queries, keys and values group by group, in rows")
        return weights

    def beside(self, path: str, module: nn.Module) -> Weights:
        """The dimensions of what is no projection of a block: embeddings, norms, the head."""
        width, size, layer = self.sizes.width, leaf_size(module), layer_of(path, self.layers)
        if is_norm(module):
            length = len(next(module.parameters(recurse=False)))
            if is_attention(self.model.get_submodule(path.rpartition(".")[0])):
                return Weights((), ())  # a norm over each head; where there is one, heads are kept whole
            if length == width:
                return Weights((), self.residual)
        elif isinstance(module, nn.Embedding):
            if path.endswith("relative_attention_bias"):
                return Weights((), (Run(f"{layer}.heads", self.sizes.heads),), by_rows=False)
            if module.embedding_dim == width:
                return Weights((), self.residual, by_rows=False)
        elif size and size[0] == width and layer is None:
            square = path.rpartition(".")[2] in SQUARE_LEAVES and size[1] == width
            return Weights(self.residual, self.residual if square else (), by_rows=not isinstance(module, Conv1D))
        elif layer is None and all(p.ndim == 1 for p in module.parameters(recurse=False)):
            return Weights((), ())  # the bias over the vocabulary that a masked language model's head owns itself
        return self.refuse(path, "has parameters")

    def aligned(self, sizes: dict[str, int]) -> Iterator[list[str]]:
        """The attention modules, those of a stack together where they share a position bias."""
        prefixes = [axis.removesuffix("kv_heads") for axis in sizes if axis.endswith("kv_heads")]
        biased = [layer_of(path, self.layers) for path, _ in own_modules(self.model)
                  if path.endswith("relative_attention_bias")]  # fmt: skip
        stack_of = [name for name, stack in stacks(self.model) for _ in stack]
        together: dict[str, list[str]] = {}
        for prefix in prefixes:
            stack = stack_of[int(prefix.partition(".")[0])]
            shared = any(stack_of[layer] == stack for layer in biased if layer is not None)
            together.setdefault(stack if shared and "cross" not in prefix else prefix, []).append(prefix)
        yield from together.values()

    def refuse(self, path: str, has: str) -> Weights:
        raise ValueError(
            f"`model` (={type(self.model).__name__}) cannot be cut: {path} {has}, which lie along no axis known here "
            f"(width {self.sizes.width}, {self.sizes.heads} heads of {self.sizes.head_dim}, inner width "
            f"{self.sizes.ffn})."
        )


def in_one_run(site: Site) -> bool:
    """Whether the rows of one role in a fused projection are side by side."""
    rows = site.rows
    return rows is None or bool((rows.diff() == 1).all())


def channels(dim: Dim) -> int:
    return sum(run.channels for run in dim)
