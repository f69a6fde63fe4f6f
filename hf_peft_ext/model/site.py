"""A place in a model where a sub-layer can sit."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Act = Literal["input", "output", "norm", "span", "attention", "cache", "leaves", "shared"]


@dataclass(frozen=True)
class Site:
    """A place in a model where a sub-layer can sit.

    Args:
        name: name of the site, as in `Placement.site`; cross-attention's begin with `cross_`.
        layer: index of the layer, encoder before decoder; None outside the blocks.
        host: path of the module whose call is changed.
        act: the tensors that a sub-layer reads and changes: the host's input and output ("input"), its output alone
            ("output"), a norm's input and output ("norm"), the input of `reads` and the host's output ("span"), the
            keys and values inside the host, through AttentionInterface ("attention") or the cache ("cache"), or the
            output of the leaf `query` and the input of the leaf `output` ("leaves"). "shared" acts nowhere: it is for
            what the sub-layers of an adapter share.
        d_in, d_out: widths of the tensor that is read and of the one that is added.
        causal: whether the tokens of this layer must not see later ones.
        attention: path of the attention module whose mask covers the tokens read here; "" outside the blocks.
        reads: path of the module whose input is read, for "span"; of one that runs before the norm, for "norm".
        of_encoder: whether the tokens read here are the encoder's, as in the keys of cross-attention.
        rows, width: for a fused projection the rows of this site, out of `width`.
        heads, d_k, d_v: shape of keys and values, for "attention", "cache" and "leaves".
        query, d_query, query_rows, output: in attention the leaf that projects to the queries, its input width, the
            rows of the queries if it is fused, and the leaf that reads the heads' outputs; "" if there is no room
            between them.
        tokens: layout of the tokens: one example in each row, all examples in one sequence without an axis for them
            ("packed", as in the vision towers of Qwen2-VL), a window of an example in each row (Swin), or examples
            whose padding cannot be read ("unread").
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
    query: str = ""
    d_query: int = 0
    query_rows: Tensor | None = None
    output: str = ""
    tokens: Literal["examples", "packed", "windows", "unread"] = "examples"

    def serves(self, site: str) -> bool:
        """Whether a placement at `site` includes this one: "query" includes "cross_query"."""
        return site in (self.name, self.name.removeprefix("cross_"))
