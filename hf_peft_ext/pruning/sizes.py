"""The sizes of a transformer, read from the leaves of its blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from torch import nn
from transformers import PreTrainedModel

from hf_peft_ext.model.attention_shape import key_shape
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import role_sizes


@dataclass(frozen=True)
class HeadShape:
    """The heads of one attention module.

    Args:
        heads, kv_heads: number of heads of queries, and of keys and values.
        head_dim: channels of a head.
    """

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Sizes:
    """The sizes that all blocks of a model share.

    Args:
        width: channels of the residual stream.
        heads, kv_heads, head_dim: as in `HeadShape`.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of a model.

    Args:
        model: any transformers model; it may have no data (the meta device).

    Raises:
        ValueError: no blocks with softmax attention were found, or they differ in width or heads.
    """
    sites = find_sites(model)
    widths = {site.d_in for site in sites if site.name == "after_residual"}
    shapes = {shape for _, shape in head_shapes(model, sites)}
    if not (widths and shapes):
        refuse_pruning(model, "no supported transformer blocks were found")
    if len(widths) > 1 or len(shapes) > 1:
        refuse_pruning(
            model, f"its blocks have widths {sorted(widths)} and {len(shapes)} shapes of heads, expected one of each"
        )
    shape = shapes.pop()
    if shape.heads % shape.kv_heads:
        raise ValueError(
            f"`num_key_value_heads` (={shape.kv_heads}) must divide `num_attention_heads` (={shape.heads}); a config "
            "without it has the default of its class."
        )
    return Sizes(widths.pop(), shape.heads, shape.kv_heads, shape.head_dim)


def head_shapes(model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, HeadShape]]:
    """Prefix of the axes of an attention module ("0." or "3.cross_") -> the shape of its heads.

    Raises:
        ValueError: an attention module does not say how wide its heads are.
    """
    outputs = {(s.layer, s.name.removesuffix("attention_output")): (s.d_in, s.d_out)
               for s in sites if s.name.endswith("attention_output")}  # fmt: skip
    for site in sites:
        if not site.serves("query"):
            continue
        cross = site.name.removesuffix("query")
        attention = model.get_submodule(site.host.rpartition(".")[0])
        sizes = role_sizes(attention)
        if (site.layer, cross) in outputs:
            sizes.setdefault("output", outputs[site.layer, cross])
        kv_heads, d_k, d_v = key_shape(attention, sizes)
        if not kv_heads or d_k != d_v or site.d_out % d_k:
            refuse_pruning(model, f"the heads of {site.host} have an unknown width")
        yield f"{site.layer}.{cross}", HeadShape(site.d_out // d_k, kv_heads, d_k)


def refuse_pruning(model: nn.Module, reason: str) -> NoReturn:
    """Raise the error for a model that cannot be cut.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"`model` (={type(model).__name__}) cannot be cut: {reason}.")
