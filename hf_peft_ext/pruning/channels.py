"""Which rows and columns of which weights belong together, so that a model can be cut consistently.

An *axis* is a set of units (channels, or heads of several channels) that runs through several weights: a unit dropped
from one is dropped from all. The axes of a model, with the layer's index in front where each layer has its own:

    residual      the stream that every block reads and adds to; embeddings, norms and heads lie along it
    0.heads       query heads of layer 0: rows of the query projection, columns of the output projection
    0.kv_heads    its key and value heads; several queries may share one
    0.ffn         inner channels of the feed-forward network, gated or not
    0.head_dim    channels inside a head, kept whole wherever possible
    3.cross_heads, 3.cross_kv_heads, 3.cross_head_dim    the same for cross-attention

Weights outside the blocks along no axis (a head over the vocabulary, small embeddings before a projection) are copied.
Inside the blocks every weight must lie along one: experts, state spaces and latent keys do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import innermost, is_attention, is_norm, layer_of, layer_paths, leaf_size, stacks
from hf_peft_ext.pruning.sizes import HeadShape, head_shapes, refuse_pruning, sizes_of

RESIDUAL = "residual"
# Linear leaves outside the blocks that lead from the stream to as many channels again: poolers, transforms of heads.
SQUARE_LEAVES = {"dense", "pooler"}

Kept = dict[str, Tensor]


@dataclass(frozen=True)
class ChannelRun:
    """Consecutive channels of a weight along an axis, `d` channels to a unit.

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
        """Number of channels."""
        return self.units * self.d

    def index(self, kept: Kept) -> Tensor:
        """The kept channels, counted from the start of the run."""
        units = kept[self.axis]
        inside = kept[self.inside] if self.inside else torch.arange(self.d, device="cpu")
        return (units[:, None] * self.d + inside).flatten()


@dataclass(frozen=True, eq=False)
class Dim:
    """One dimension of a weight: its runs, one after the other. False where it has none, and is never cut.

    Args:
        runs: the runs.
        order: for each channel of the runs its place in the weight, where the weight has them in another order, such
            as query, key and value head by head (GPT-NeoX); shape: (channels,).
    """

    runs: tuple[ChannelRun, ...] = ()
    order: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self.runs)

    @property
    def channels(self) -> int:
        """Number of channels of all runs."""
        return sum(run.channels for run in self.runs)

    def index(self, kept: Kept, runs: int | None = None) -> Tensor:
        """The kept channels, ascending.

        Args:
            kept: the kept units of each axis.
            runs: of how many of the runs, from the first; None for all.
        """
        return self.places(kept, runs).sort().values

    def places(self, kept: Kept, runs: int | None = None) -> Tensor:
        """The kept channels, run after run."""
        starts = [sum(run.channels for run in self.runs[:i]) for i in range(len(self.runs))]
        parts = [start + run.index(kept) for start, run in zip(starts, self.runs, strict=True)][:runs]
        index = torch.cat(parts)
        return index if self.order is None else self.order[index]


UNCUT = Dim()


@dataclass(frozen=True)
class Weights:
    """The dimensions of a module's weight.

    Args:
        columns: along its input.
        rows: along its output, as are its bias and the scale of a norm.
        by_rows: whether the weight is stored as (rows, columns), as in `nn.Linear`, or the other way round.
        query: whether the first run of its rows computes queries.
    """

    columns: Dim
    rows: Dim
    by_rows: bool = True
    query: bool = False

    def dims(self, ndim: int) -> tuple[Dim, ...]:
        """The dimensions of a parameter of the module, as it is stored."""
        if ndim != 2:
            return (self.rows, *(UNCUT,) * (ndim - 1))
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
    """The axes of a model, read from its structure.

    Raises:
        ValueError: no blocks were found, or a weight of a block lies along no axis.
    """
    return ChannelFinder(model).find()


class ChannelFinder:
    """Sorts the weights of one model along its axes.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.sizes = model, sizes_of(model)
        self.layers, self.sites = layer_paths(model), find_sites(model)
        self.shapes = dict(head_shapes(model, self.sites))
        self.ffn = {site.layer: site.d_in for site in self.sites if site.name == "ffn_output"}
        self.residual = Dim((ChannelRun(RESIDUAL, self.sizes.width),))

    def find(self) -> Channels:
        """The axes.

        Raises:
            ValueError: a weight of a block lies along no axis.
        """
        channels, weights = Channels(), {}
        by_host: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.act == "input":
                by_host.setdefault(site.host, []).append(site)
        for host, sites in by_host.items():
            if of_block := self.of_sites(host, sites):
                weights[host] = of_block
        for path, module in own_modules(self.model):
            module = innermost(module)
            if path not in weights and list(module.parameters(recurse=False)):
                weights[path] = self.beside(path, module)
        channels.weights = weights
        runs = [run for w in weights.values() for dim in (w.rows, w.columns) for run in dim.runs]
        channels.sizes = {run.axis: run.units for run in runs} | {run.inside: run.d for run in runs if run.inside}
        channels.aligned = list(self.aligned(channels.sizes))
        return channels

    def of_sites(self, host: str, sites: list[Site]) -> Weights | None:
        """The dimensions of a linear leaf of a block, which may be fused from several; None for other modules."""
        site = sites[0]
        cross = "cross_" if site.name.startswith("cross_") else ""
        dims = self.dims(f"{site.layer}.{cross}", site)
        if dims is None:
            return None
        module, (columns, rows) = innermost(self.model.get_submodule(host)), dims
        if site.rows is not None:  # a fused projection
            parts = {s.name.removeprefix(cross): s for s in sites}
            if parts.keys() != {"query", "key", "value"}:
                self.refuse(host, "computes keys and values from a latent vector")
            stored = [parts[name].rows for name in ("query", "key", "value")]
            order = torch.cat([role for role in stored if role is not None])
            in_order = torch.equal(order, torch.arange(len(order), device="cpu"))
            rows = Dim(rows.runs, None if in_order else order)
        query = site.name == f"{cross}query"
        size = leaf_size(module)
        if size != (columns.channels, rows.channels):
            self.refuse(host, f"maps {size}, along no known axis")
        return Weights(columns, rows, by_rows=not isinstance(module, Conv1D), query=query)

    def dims(self, prefix: str, site: Site) -> tuple[Dim, Dim] | None:
        """The columns and rows of the leaf of a site."""
        name = site.name.removeprefix("cross_")
        if name in ("query", "key", "value", "attention_output"):
            shape = self.shapes.get(prefix) or self.refuse(site.host, "belongs to no softmax attention")
            heads, kv = self.heads(prefix, shape)
            by_role = {"query": (heads,), "attention_output": (heads,)}
            runs = (heads, kv, kv) if site.rows is not None else by_role.get(name, (kv,))
            return (Dim(runs), self.residual) if name == "attention_output" else (self.residual, Dim(runs))
        inner = self.ffn.get(site.layer, 0)
        ffn = ChannelRun(f"{site.layer}.ffn", inner)
        if name in ("ffn_input", "ffn_gate") and inner:  # a gate may be fused with the input (ModernBERT, Phi-3)
            return self.residual, Dim((ffn,) * max(1, site.d_out // inner))
        return (Dim((ffn,)), self.residual) if name == "ffn_output" else None

    def heads(self, prefix: str, shape: HeadShape) -> tuple[ChannelRun, ChannelRun]:
        """The runs of query heads, and of key and value heads."""
        inside = f"{prefix}head_dim"
        kv = ChannelRun(f"{prefix}kv_heads", shape.kv_heads, shape.head_dim, inside)
        return ChannelRun(f"{prefix}heads", shape.heads, shape.head_dim, inside), kv

    def beside(self, path: str, module: nn.Module) -> Weights:
        """The dimensions of a module that is no projection of a block: embeddings, norms, the head."""
        width, size, layer = self.sizes.width, leaf_size(module), layer_of(path, self.layers)
        by_rows = not isinstance(module, Conv1D)
        if all(parameter.numel() == 1 for parameter in module.parameters(recurse=False)):
            return Weights(UNCUT, UNCUT)  # a scale
        if is_norm(module):
            return self.norm(path, len(next(module.parameters(recurse=False))), layer)
        if isinstance(module, nn.Embedding):
            if path.endswith("relative_attention_bias") and layer is not None:
                return Weights(UNCUT, Dim((ChannelRun(f"{layer}.heads", self.sizes.heads),)), by_rows=False)
            if module.embedding_dim == width:
                return Weights(UNCUT, self.residual, by_rows=False)
        elif size and layer is None:
            d_in, d_out = size
            square = path.rpartition(".")[2] in SQUARE_LEAVES or d_in != width
            rows = self.residual if d_out == width and square else UNCUT
            return Weights(self.residual if d_in == width else UNCUT, rows, by_rows)
        return Weights(UNCUT, UNCUT) if layer is None else self.refuse(path, "has parameters along no known axis")

    def norm(self, path: str, length: int, layer: int | None) -> Weights:
        """The dimensions of a norm: over the stream, over one head (kept whole), or over all heads (OLMo-2)."""
        owner = path.rpartition(".")[0]
        if layer is not None and is_attention(self.model.get_submodule(owner)):
            prefix = next((site.name.removesuffix("query") for site in self.sites
                           if site.serves("query") and site.host.startswith(f"{owner}.")), "")  # fmt: skip
            runs = self.heads(f"{layer}.{prefix}", self.shapes[f"{layer}.{prefix}"])
            along = next((run for run in runs if run.channels == length), None)
            return Weights(UNCUT, Dim((along,)) if along else UNCUT)
        if length == self.sizes.width:
            return Weights(UNCUT, self.residual)
        return Weights(UNCUT, UNCUT) if layer is None else self.refuse(path, "has parameters along no known axis")

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

    def refuse(self, path: str, has: str) -> NoReturn:
        """Raise the error for a module, with the sizes of the known axes."""
        sizes = self.sizes
        refuse_pruning(
            self.model,
            f"{path} {has} (width {sizes.width}, {sizes.heads} heads of {sizes.head_dim}, inner widths "
            f"{sorted(set(self.ffn.values()))})",
        )
