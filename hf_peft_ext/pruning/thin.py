"""A thin copy of a model: fewer channels, heads and inner channels in every layer, those that matter most.

    W' = W[rows kept, columns kept]

The channels of the residual stream are the same in all layers, embeddings, norms and heads; heads are kept whole; both
sides of an FFN keep the same inner channels. So a thin copy with r = 1 is the model itself. This is where we leave the
paper and ladder side-tuning's `fisher-v2`, which choose the rows of each matrix by themselves, across the borders of
heads, and so add channels of one layer to other channels of the next.

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

from ..placement import check
from ..quantized import plain_weight
from ..structure import innermost, own_modules
from .channels import RESIDUAL, Channels, Dim, Kept, find_channels, index_of
from .importance import Importance
from .importance import importance as importance_of
from .sizes import Reading, Sizes, sizes_of, thin_config

KEPT = "kept.safetensors"


@dataclass
class ThinModel:
    """A thin copy, and what it kept.

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
        """Which channels of the input of the large model's module `path` are kept; None for all."""
        return index_of(self.channels.weights[path].columns, self.kept)

    def rows_of(self, path: str) -> Tensor | None:
        """Which channels of the output of the large model's module `path` are kept; None for all."""
        return index_of(self.channels.weights[path].rows, self.kept)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the copy as any model is written, and beside it what it kept.

        Raises:
            ValueError: the model scales its embeddings by its width, which a copy that is loaded has another of.
        """
        modules: Any = self.model.modules()
        found = {float(m.embed_scale) for m in modules if getattr(m, "embed_scale", None) is not None}
        width = math.sqrt(self.model.config.hidden_size)
        same = all(scale == 1 or math.isclose(scale, width, rel_tol=1e-3) for scale in found)
        rule = "scales its embeddings by the large model's width, which is lost on saving; keep it in memory"
        check("model", type(self.model).__name__, same, rule)
        self.model.save_pretrained(folder)
        sizes = {axis: str(d) for axis, d in self.channels.sizes.items()}
        save_file({axis: units.clone() for axis, units in self.kept.items()}, Path(folder, KEPT), sizes)

    @classmethod
    def from_pretrained(cls, folder: str | Path, large: PreTrainedModel) -> "ThinModel":
        """What `save_pretrained` has written.

        Args:
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


def thin_copy(
    model: PreTrainedModel, r: float, reading: Reading = "width", importance: Importance | None = None
) -> ThinModel:
    """A thin copy of a model.

    Args:
        model: a GPT-2, T5, Llama, Mistral, Qwen, BERT or RoBERTa model; a quantised one is read leaf by leaf, and its
            copy is not quantised. It is left as it was.
        r: the factor, at least 1.
        reading: what r divides, every dimension ("width") or the number of parameters ("parameters", so that each
            dimension is divided by the square root of r).
        importance: the scores of rows and columns; None for the weights' magnitude, which needs no data. An axis goes
            by the sum of the scores of all weights along it, where those of each weight are divided by their sum, so
            that each has one vote.

    Raises:
        ValueError: `r` is below 1, `reading` unknown, the architecture cannot be cut, or `importance` is not of this
            model.
        TypeError: `model` is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers model, not {type(model).__name__}.")
    config = thin_config(model.config, r, reading)
    channels = find_channels(model)
    scores = axis_scores(channels, importance or importance_of(model, kind="magnitude"))
    kept = choose(channels, scores, sizes_of(config))
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        thin = type(model)(config)
    leave_out(thin, model)
    fill(thin, model, channels, kept)
    if model.can_generate():
        thin.generation_config = copy.deepcopy(model.generation_config)
    return ThinModel(thin.train(model.training), kept, channels)


def axis_scores(channels: Channels, importance: Importance) -> dict[str, Tensor]:
    """Axis -> the score of each channel of each of its units, shape: (units, d)."""
    found: dict[str, Any] = defaultdict(float)
    for path, weights in channels.weights.items():
        for dim, table in ((weights.rows, importance.rows), (weights.columns, importance.columns)):
            if dim and path in table:
                scores = table[path].double().cpu()
                rule = f"must be of this model: {path} has {sum(run.channels for run in dim)} channels"
                check("importance", len(scores), len(scores) == sum(run.channels for run in dim), rule)
                scores = scores / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)
                for run, part in zip(dim, scores.split([run.channels for run in dim]), strict=True):
                    found[run.axis] = found[run.axis] + part.view(run.units, run.d)
    lacks = sorted(axis for axis in channels.sizes if axis not in found and not axis.endswith("head_dim"))
    check("importance", lacks[:3], not lacks, "must have scores for every axis of the model")
    return found


def choose(channels: Channels, scores: dict[str, Tensor], thin: Sizes) -> Kept:
    """Axis -> the units with the highest scores, as many as the thin sizes say."""
    kept = {RESIDUAL: highest(scores[RESIDUAL].flatten(), thin.width)}
    for axis in channels.sizes:
        if axis.endswith(".ffn"):
            kept[axis] = highest(scores[axis].flatten(), thin.ffn)
    for prefixes in channels.aligned:
        queries = torch.stack([scores[f"{p}heads"].sum(dim=1) for p in prefixes]).sum(dim=0)  # shape: (heads,)
        keys = torch.stack([scores[f"{p}kv_heads"].sum(dim=1) for p in prefixes]).sum(dim=0)  # shape: (kv_heads,)
        groups = queries.view(len(keys), -1)  # the queries that share a key
        kv_heads = highest(keys + groups.sum(dim=1), thin.kv_heads)
        chosen = [highest(groups[g], thin.heads // thin.kv_heads) + g * groups.shape[1] for g in kv_heads]
        heads = torch.cat(chosen)
        for p in prefixes:
            inside = scores[f"{p}heads"][heads].sum(dim=0) + scores[f"{p}kv_heads"][kv_heads].sum(dim=0)
            kept |= {f"{p}heads": heads, f"{p}kv_heads": kv_heads, f"{p}head_dim": highest(inside, thin.head_dim)}
    return kept


def highest(scores: Tensor, n: int) -> Tensor:
    """The indices of the n highest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:n].sort().values


def leave_out(thin: nn.Module, large: nn.Module) -> None:
    """Take out what a class builds unless it is told not to, and the large model lacks, such as BERT's pooler."""
    present = {path for path, _ in own_modules(large)}
    for path, module in list(own_modules(thin)):
        for name, _ in list(module.named_children()):
            if path in present and (f"{path}.{name}" if path else name) not in present:
                setattr(module, name, None)


def fill(thin: PreTrainedModel, large: PreTrainedModel, channels: Channels, kept: Kept) -> None:
    """Put slices of the large model's weights into the thin one, one module at a time."""
    sources = {path: innermost(module) for path, module in own_modules(large)}
    before, after = sizes_of(large.config).head_dim, sizes_of(thin.config).head_dim
    # scores are divided by the square root of a head's width: a narrower head's would be too large
    rescale = math.sqrt(after / before) if getattr(large.config, "scale_attn_weights", True) else 1.0
    dtype = (
        large.dtype if getattr(large, "is_quantized", False) else None
    )  # packed leaves cast their inputs, plain don't
    filled: set[nn.Parameter] = set()
    for path, module in thin.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in filled:
                continue  # tied to one that was before
            filled.add(parameter)
            source, weights = sources[path], channels.weights[path]
            whole = plain_weight(source) if name == "weight" else getattr(source, name).detach()
            dims = weights.dims(whole.ndim)
            part = sliced(whole, dims, kept)
            if weights.query and rescale != 1.0:
                along = dims.index(weights.rows)
                part.narrow(along, 0, len(index_of(weights.rows[:1], kept))).mul_(rescale)  # type: ignore[arg-type]
            if name == "weight" and isinstance(module, Conv1D) and not isinstance(source, Conv1D):
                part = part.T.contiguous()  # GPT-2's are turned round when they are packed
            parameter.data = part.to(dtype or part.dtype)
        scale = getattr(sources[path], "embed_scale", None)
        if isinstance(scale, float):  # BART's, from the large model's width
            cast(Any, module).embed_scale = scale
        for name, _ in module.named_buffers(recurse=False):
            module.register_buffer(name, copy_of(sources[path], name), name not in module._non_persistent_buffers_set)


def sliced(weight: Tensor, dims: tuple[Dim, ...], kept: Kept) -> Tensor:
    """A copy of the kept part of a weight."""
    for i, dim in enumerate(dims):
        index = index_of(dim, kept)
        if index is not None:
            weight = weight.index_select(i, index.to(weight.device))
    return weight.clone()


def copy_of(module: nn.Module, buffer: str) -> Tensor:
    """A buffer of the large model: those of the families known here, positions and frequencies, are not cut."""
    return getattr(module, buffer).clone()
