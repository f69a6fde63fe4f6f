"""What several sub-layers read is read once: query, value and prefix of an attention module multiply the same x."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..sites import Site
from ..structure import attention_leaves
from ..sublayers.additive import product

if TYPE_CHECKING:
    from .attach import Attached


class Reader:
    """The product of one x with the rows of all the sub-layers that read it.

    The first sub-layer that meets a new x makes the product for all, each of the others then takes its part. Nothing
    is kept once all have read.
    """

    def __init__(self) -> None:
        self.layers: list[Attached] = []
        self.forget()

    def forget(self) -> None:
        self.x: Tensor | None = None
        self.parts: dict[tuple[int, str], Tensor] = {}  # (index of the layer, adapter) -> its columns of the product

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "x": None, "parts": {}}

    def read(
        self,
        layer: "Attached",
        adapter: str,
        x: Tensor,  # shape: (*batch, d_in)
    ) -> Tensor | None:  # shape: (*batch, k)
        """x times the rows of one sub-layer; None if it has no rows."""
        sublayer: Any = layer.sublayer_of[adapter]
        if not alike(sublayer, sublayer):
            return sublayer.read(x)
        key = (self.layers.index(layer), adapter)
        if self.x is not x or key not in self.parts:
            self.x, self.parts = x, self.products(sublayer, x)
        part = self.parts.pop(key)
        if not self.parts:
            self.x = None
        return part

    def products(self, first: Any, x: Tensor) -> dict[tuple[int, str], Tensor]:
        readers = {
            (i, name): sublayer.rows_in
            for i, layer in enumerate(self.layers)
            for name in layer.present
            if alike(sublayer := layer.sublayer_of[name], first)
        }
        parts = product(x, [row for rows in readers.values() for row in rows])
        widths = [sum(map(len, rows)) for rows in readers.values()]
        return dict(zip(readers, parts.split(widths, dim=-1), strict=True))


def alike(sublayer: Any, other: Any) -> bool:
    """Whether two sub-layers multiply x as it is, with rows of one width, type and device."""
    own, others = sublayer.rows_in, other.rows_in
    if not (own and others and sublayer.reads_plain):
        return False
    return (
        own[0].shape[1] == others[0].shape[1] and own[0].dtype == others[0].dtype and own[0].device == others[0].device
    )


def reader_for(model: nn.Module, site: Site, kind: type) -> Reader:
    """The reader of the tuner layers (of class `kind`) that read what this site reads: an attention module's input."""
    inside = site.act in ("attention", "cache")
    attention = model.get_submodule(site.host if inside else site.host.rpartition(".")[0])
    if not reads_input(attention, site):
        return Reader()
    layers: list[Any] = [m for m in attention.modules() if isinstance(m, kind)]
    same = (m for m in layers if reads_input(attention, m.site) and m.site.of_encoder == site.of_encoder)
    near = next(same, None)
    return Reader() if near is None else near.reader


def reads_input(attention: nn.Module, site: Site) -> bool:
    """Whether a site in this attention module reads the module's input (and not a latent)."""
    names = ("query", "key", "value", "attention")
    return site.name.removeprefix("cross_") in names and "latent" not in attention_leaves(attention)
