"""A pruned copy of a model: fewer channels, heads and inner channels in every layer, those that matter most.

    W' = W[rows kept, columns kept]

The channels of the residual stream are the same in all layers, embeddings, norms and heads; heads are kept whole; both
sides of an FFN keep the same inner channels. So a pruned copy with r = 1 is the model itself. The paper and ladder
side-tuning's `fisher-v2` differ: they choose the rows of each matrix separately, across the borders of heads, and so
add channels of one layer to other channels of the next.

Pruning needs to know what each axis of each weight is, so it covers fewer models than sub-layers do. Refused are
experts, mixers without softmax and latent keys. ALiBi's slopes depend on the number of heads, so a pruned BLOOM has
other slopes.

The bridge of "Parameter-efficient Tuning for Large Language Model without Calculating Its Gradients", Jin et al. 2023,
and the side network of "LST: Ladder Side-Tuning", Sung et al. 2022 (https://arxiv.org/abs/2206.06522).
"""

import copy
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.quantization import plain_weight
from hf_peft_ext.model.structure import innermost
from hf_peft_ext.pruning.channels import RESIDUAL, Channels, Dim, Kept, Weights, find_channels
from hf_peft_ext.pruning.importance import Importance
from hf_peft_ext.pruning.importance import importance as importance_of
from hf_peft_ext.pruning.pruned_config import Reduce, pruned_config
from hf_peft_ext.pruning.sizes import refuse_pruning
from hf_peft_ext.validation.checks import check

KEPT = "kept.safetensors"


@dataclass
class PrunedModel:
    """A pruned copy, and the units that it kept.

    Args:
        model: the copy, of the large model's class; every parameter is trainable.
        kept: axis -> indices kept, ascending: "residual" (channels), "0.heads", "0.kv_heads" (heads), "0.head_dim"
            (channels of a head), "0.ffn" (inner channels), and so on (see `channels`); layers are counted encoder
            before decoder.
        channels: the axes of the large model.
    """

    model: PreTrainedModel
    kept: Kept
    channels: Channels

    def columns_of(self, path: str) -> Tensor | None:
        """The kept input channels of the large model's module `path`, ascending; None for all."""
        columns = self.channels.weights[path].columns
        return columns.index(self.kept) if columns else None

    def rows_of(self, path: str) -> Tensor | None:
        """The kept output channels of the large model's module `path`, ascending; None for all."""
        rows = self.channels.weights[path].rows
        return rows.index(self.kept) if rows else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the copy as any model is saved, and the kept units beside it.

        Raises:
            ValueError: the model scales its embeddings by its width, and would scale them differently once loaded.
        """
        modules: Any = self.model.modules()
        scales = {float(m.embed_scale) for m in modules if getattr(m, "embed_scale", None) is not None}
        width = math.sqrt(self.model.config.hidden_size)
        same = all(scale == 1 or math.isclose(scale, width, rel_tol=1e-3) for scale in scales)
        rule = "scales its embeddings by the large model's width, which is lost on saving; keep it in memory"
        check("model", type(self.model).__name__, same, rule)
        self.model.save_pretrained(folder)
        sizes = {axis: str(d) for axis, d in self.channels.sizes.items()}
        save_file({axis: units.clone() for axis, units in self.kept.items()}, Path(folder, KEPT), sizes)

    @classmethod
    def from_pretrained(cls, folder: str | Path, large: PreTrainedModel) -> "PrunedModel":
        """Load what `save_pretrained` saved.

        Args:
            folder: where it was saved.
            large: the large model, or one of its shapes without weights (on the meta device).

        Raises:
            ValueError: the copy is of a model of other shapes.
        """
        channels = find_channels(large)
        with safe_open(Path(folder, KEPT), "pt") as file:
            kept, sizes = {axis: file.get_tensor(axis) for axis in file.keys()}, file.metadata()
        fits = sizes == {axis: str(d) for axis, d in channels.sizes.items()}
        check("large", type(large).__name__, fits, f"must have the shapes of the model that {folder} was cut from")
        attention = large.config._attn_implementation
        return cls(type(large).from_pretrained(folder, attn_implementation=attention), kept, channels)


def pruned_copy(
    model: PreTrainedModel, r: float, reduce: Reduce = "width", importance: Importance | None = None
) -> PrunedModel:
    """A pruned copy of a model.

    Args:
        model: a transformers model, which is not changed. A quantized one is read leaf by leaf, and its copy is not
            quantized.
        r: the factor, at least 1.
        reduce: what r divides, every dimension ("width") or the number of parameters ("parameters", so that each
            dimension is divided by the square root of r).
        importance: the scores of rows and columns; None for the weights' magnitude, which needs no data. The scores of
            each weight are divided by their sum; the score of a unit is their sum over the weights along its axis.

    Raises:
        ValueError: `r` is below 1, `reduce` unknown, the architecture cannot be cut, or `importance` is not of this
            model.
        TypeError: `model` is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers model, not {type(model).__name__}.")
    config = pruned_config(model, r, reduce)
    channels = find_channels(model)
    scores = axis_scores(channels, importance or importance_of(model, kind="magnitude"))
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
        pruned = type(model)(config)
    drop_extra_modules(pruned, model)
    into = find_channels(pruned)
    if into.sizes.keys() != channels.sizes.keys() or any(into.sizes[axis] > n for axis, n in channels.sizes.items()):
        refuse_pruning(model, "its class builds other blocks from the pruned config")
    kept = choose(channels, scores, into.sizes)
    fill_pruned(pruned, model, channels, into, kept)
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    return PrunedModel(pruned.train(model.training), kept, channels)


def axis_scores(channels: Channels, importance: Importance) -> dict[str, Tensor]:
    """Axis -> the score of each channel of each of its units, shape: (units, d).

    Args:
        channels: the axes of the model.
        importance: the scores of its rows and columns.

    Raises:
        ValueError: the scores are not of this model.
    """
    by_axis: dict[str, Any] = defaultdict(float)
    for path, weights in channels.weights.items():
        for dim, table in ((weights.rows, importance.rows), (weights.columns, importance.columns)):
            if dim and path in table:
                scores = table[path].double().cpu()
                rule = f"must be of this model: {path} has {dim.channels} channels"
                check("importance", len(scores), len(scores) == dim.channels, rule)
                scores = scores if dim.order is None else scores[dim.order]
                scores = scores / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)
                for run, part in zip(dim.runs, scores.split([run.channels for run in dim.runs]), strict=True):
                    by_axis[run.axis] = by_axis[run.axis] + part.view(run.units, run.d)
    missing = sorted(axis for axis in channels.sizes if axis not in by_axis and not axis.endswith("head_dim"))
    check("importance", missing[:3], not missing, "must have scores for every axis of the model")
    return by_axis


def choose(channels: Channels, scores: dict[str, Tensor], sizes: dict[str, int]) -> Kept:
    """Axis -> the units with the highest scores, as many as `sizes` says.

    Args:
        channels: the axes of the large model.
        scores: from `axis_scores`.
        sizes: axis -> units of the pruned model.
    """
    kept = {axis: highest(scores[axis].flatten(), sizes[axis]) for axis in sizes if axis.endswith((RESIDUAL, ".ffn"))}
    for prefixes in channels.aligned:
        n_heads, n_kv, head_dim = (sizes[f"{prefixes[0]}{axis}"] for axis in ("heads", "kv_heads", "head_dim"))
        queries = torch.stack([scores[f"{p}heads"].sum(dim=1) for p in prefixes]).sum(dim=0)  # shape: (heads,)
        keys = torch.stack([scores[f"{p}kv_heads"].sum(dim=1) for p in prefixes]).sum(dim=0)  # shape: (kv_heads,)
        groups = queries.view(len(keys), -1)  # the queries that share a key
        kv_heads = highest(keys + groups.sum(dim=1), n_kv)
        chosen = [highest(groups[g], n_heads // n_kv) + g * groups.shape[1] for g in kv_heads]
        heads = torch.cat(chosen)
        for p in prefixes:
            inside = scores[f"{p}heads"][heads].sum(dim=0) + scores[f"{p}kv_heads"][kv_heads].sum(dim=0)
            kept |= {f"{p}heads": heads, f"{p}kv_heads": kv_heads, f"{p}head_dim": highest(inside, head_dim)}
    return kept


def highest(scores: Tensor, n: int) -> Tensor:
    """The indices of the n highest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:n].sort().values


def drop_extra_modules(pruned: nn.Module, large: nn.Module) -> None:
    """Remove modules that a class builds by default and the large model lacks, such as BERT's pooler."""
    present = {path for path, _ in own_modules(large)}
    for path, module in list(own_modules(pruned)):
        for name, _ in list(module.named_children()):
            if path in present and (f"{path}.{name}" if path else name) not in present:
                setattr(module, name, None)


def fill_pruned(
    pruned: PreTrainedModel, large: PreTrainedModel, channels: Channels, into: Channels, kept: Kept
) -> None:
    """Put slices of the large model's weights into the pruned one, one module at a time.

    Args:
        pruned, large: the models.
        channels, into: the axes of the large one, and of the pruned one.
        kept: axis -> the kept units.

    Raises:
        ValueError: a weight of the pruned model has another shape than its slice.
    """
    sources = {path: innermost(module) for path, module in own_modules(large)}
    # packed leaves cast their inputs, plain ones do not
    dtype = large.dtype if getattr(large, "is_quantized", False) else None
    filled: set[nn.Parameter] = set()
    for path, module in pruned.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in filled:
                continue  # tied to an earlier one
            filled.add(parameter)
            source, weights = sources[path], channels.weights[path]
            whole = plain_weight(source) if name == "weight" else getattr(source, name).detach()
            part = sliced(whole, weights, kept, query_scale(large, weights, into))
            check_order(large, path, into.weights[path], weights.rows, kept)
            if name == "weight" and isinstance(module, Conv1D) and not isinstance(source, Conv1D):
                part = part.T.contiguous()  # a quantized leaf of GPT-2 is stored the other way round
            if part.shape != parameter.shape:
                shapes = f"{tuple(part.shape)} after pruning, expected {tuple(parameter.shape)}"
                refuse_pruning(large, f"{path}.{name} has shape {shapes}")
            parameter.data = part.to(dtype or part.dtype)
        scale = getattr(sources[path], "embed_scale", None)
        if isinstance(scale, float):  # BART's, from the large model's width
            cast(Any, module).embed_scale = scale
        copy_buffers(module, sources[path])


def query_scale(large: PreTrainedModel, weights: Weights, into: Channels) -> float:
    """The factor on the rows that compute queries.

    Attention scores are divided by the square root of a head's width. Those of a narrower head would be too large
    without the factor.
    """
    if not weights.query or not getattr(large.config, "scale_attn_weights", True):
        return 1.0
    run = weights.rows.runs[0]
    return math.sqrt(into.sizes[run.inside] / run.d)


def sliced(weight: Tensor, weights: Weights, kept: Kept, query_scale: float) -> Tensor:
    """A copy of the kept part of a parameter.

    Args:
        weight: as it is stored.
        weights: its dimensions.
        kept: axis -> the kept units.
        query_scale: the factor on rows that compute queries.
    """
    dims = weights.dims(weight.ndim)
    part = weight if any(dims) else weight.clone()
    for i, dim in enumerate(dims):
        if dim:
            part = part.index_select(i, dim.index(kept).to(weight.device))
    if query_scale != 1.0:
        rows = weights.rows
        queries = torch.isin(rows.index(kept), rows.index(kept, runs=1)).to(weight.device)  # shape: (rows,)
        along = part.movedim(dims.index(rows), 0)
        along[queries] *= query_scale
    return part


def check_order(large: nn.Module, path: str, into: Weights, rows: Dim, kept: Kept) -> None:
    """Refuse a fused projection whose parts are interleaved in another way in the pruned model (CodeGen).

    Raises:
        ValueError: the kept rows, in the order in which the pruned model reads them, are not ascending.
    """
    if into.rows.order is not None:
        placed = torch.empty_like(into.rows.order).scatter(0, into.rows.order, rows.places(kept))
        if not torch.equal(placed, rows.index(kept)):
            refuse_pruning(large, f"{path} interleaves queries, keys and values across heads")


def copy_buffers(module: nn.Module, source: nn.Module) -> None:
    """Copy the large model's buffers, such as positions and frequencies, unless their shape depends on its sizes."""
    for name, own in module.named_buffers(recurse=False):
        buffer = getattr(source, name)
        if buffer.shape == own.shape:
            module.register_buffer(name, buffer.clone(), name not in module._non_persistent_buffers_set)
