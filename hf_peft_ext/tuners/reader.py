"""What several sub-layers read is read once: query, value and prefix of an attention module multiply the same x."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..sites import Site
from ..structure import attention_leaves
from ..sublayers.additive import product

if TYPE_CHECKING:
    from .attach import Attached

Parts = dict[tuple[int, str], Tensor]  # (index of the layer, adapter) -> its columns of the product


class Reader:
    """The product of one x with the rows of all the sub-layers that read it, while an attention module runs.

    The first sub-layer that meets a new x makes the product for all, each of the others then takes its part. Nothing
    outlives the module's forward.

    Args:
        attention: the module; None for a sub-layer that reads alone.
    """

    def __init__(self, attention: nn.Module | None = None):
        self.layers: list[Attached] = []
        self.attention = (attention,)
        self.handles: list[RemovableHandle] = []
        self.running = False
        self.kept: tuple[Tensor, Parts] | None = None  # one x and its parts, together: threads may share a model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": False, "kept": None}

    def join(self, layer: "Attached") -> None:
        self.layers.append(layer)
        if self.attention[0] is not None and not self.handles:
            self.handles = [
                self.attention[0].register_forward_pre_hook(self.start, prepend=True),
                self.attention[0].register_forward_hook(self.stop),
            ]

    def leave(self, layer: "Attached") -> None:
        self.layers.remove(layer)
        if not self.layers:
            for handle in self.handles:
                handle.remove()

    def start(self, *_: Any) -> None:
        self.running, self.kept = True, None

    def stop(self, *_: Any) -> None:
        self.running, self.kept = False, None

    def read(
        self,
        layer: "Attached",
        adapter: str,
        x: Tensor,  # shape: (*batch, d_in)
    ) -> Tensor | None:  # shape: (*batch, k)
        """x times the rows of one sub-layer; None if it has no rows."""
        sublayer: Any = layer.sublayer_of[adapter]
        if not self.running or shape_of(sublayer) is None:
            return sublayer.read(x)
        key, kept = (self.layers.index(layer), adapter), self.kept
        if kept is None or kept[0] is not x or key not in kept[1]:
            kept = self.kept = x, self.products(sublayer, x)
        part = kept[1].pop(key, None)
        return sublayer.read(x) if part is None else part

    def products(self, first: Any, x: Tensor) -> Parts:
        readers = {
            (i, name): layer.sublayer_of[name].rows_in
            for i, layer in enumerate(self.layers)
            for name in layer.present
            if shape_of(layer.sublayer_of[name]) == shape_of(first)
        }
        parts = product(x, [row for rows in readers.values() for row in rows])
        widths = [sum(map(len, rows)) for rows in readers.values()]
        return dict(zip(readers, parts.split(widths, dim=-1), strict=True))


def shape_of(sublayer: Any) -> tuple[Any, ...] | None:
    """Width, type and device of a sub-layer's rows; None if it has none, or does not read x as it is."""
    rows = sublayer.rows_in
    return (rows[0].shape[1], rows[0].dtype, rows[0].device) if rows and sublayer.reads_plain else None


def reader_for(model: nn.Module, site: Site, kind: type) -> Reader:
    """The reader of the tuner layers (of class `kind`) that read what this site reads: an attention module's input."""
    inside = site.act in ("attention", "cache")
    attention = model.get_submodule(site.host if inside else site.host.rpartition(".")[0])
    if not reads_input(attention, site):
        return Reader()
    layers: list[Any] = [m for m in attention.modules() if isinstance(m, kind)]
    same = (m for m in layers if reads_input(attention, m.site) and m.site.of_encoder == site.of_encoder)
    near = next(same, None)
    return Reader(attention) if near is None else near.reader


def reads_input(attention: nn.Module, site: Site) -> bool:
    """Whether a site in this attention module reads the module's input (and not a latent)."""
    names = ("query", "key", "value", "attention")
    return site.name.removeprefix("cross_") in names and "latent" not in attention_leaves(attention)
