"""The tuner layer: a child of the module it changes, acting through a hook.

Nothing of the base model is replaced. Its parameter names stay as they are, so nesting, unloading, quantised leaves
and mixture-of-experts blocks need no code of their own.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.attach.forward_state import FORWARD, new_key
from hf_peft_ext.attach.masks import mask_position, visible_tokens
from hf_peft_ext.model.sites import Site
from hf_peft_ext.model.structure import given_cache, innermost
from hf_peft_ext.sublayers import Bias, LowRank


class TunerLayer(nn.Module, BaseTunerLayer):
    """The sub-layers, one for each adapter, that sit at one site.

    Args:
        model: the base model.
        site: where this layer acts.
        name: name of this layer among the children of its holder.
    """

    adapter_layer_names = ("sublayer_of",)

    sublayer_of: Any  # adapter name -> sub-layer

    def __init__(self, model: nn.Module, site: Site, name: str):
        super().__init__()
        self.sublayer_of = nn.ModuleDict()
        self.site = site
        self.name = name
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self._unbiased = False  # whether merging gave the host a bias that it did not have
        self._host = (model.get_submodule(site.host),)  # in a tuple: not a child
        self._holder = (model.get_submodule(holder_of(site)),)
        # the attention whose mask tells the padding, and its block; none for what lies outside the blocks
        paths = (site.attention, block_of(model, site.attention)) if site.attention else ()
        self._attended = tuple(model.get_submodule(path) for path in paths)
        self._padding = ""  # key of the padding mask in `FORWARD`, if a gate needs it
        self._handles: list[RemovableHandle] = self.hooks(model)

    @abstractmethod
    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook this layer to the modules that its site reads and changes."""

    def forward(self, x: Tensor) -> Tensor:
        """x itself, for hosts that run their children in turn."""
        return x

    @property
    def host(self) -> nn.Module:
        return self._host[0]

    @property
    def holder(self) -> nn.Module:
        """The module that has this layer as a child: the host, but for norms."""
        return self._holder[0]

    def get_base_layer(self) -> nn.Module:
        return self.host

    def put(self, adapter_name: str, sublayer: nn.Module) -> None:
        """Add the sub-layer of an adapter, on the device and in the type of the host."""
        self.sublayer_of[adapter_name] = sublayer
        gate: Any = getattr(sublayer, "gate", None)
        if gate is not None and gate.pooling == "mean" and self._attended and not self._padding:
            self._padding, handles = note_padding(*self._attended)
            self._handles += handles
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        own = [p for name, p in base_layer.named_parameters() if "sublayer_of." not in name and not p.is_meta]
        types = (p.dtype for p in own if p.dtype.is_floating_point)
        dtype = getattr(base_layer, "compute_dtype", None) or next(types, None)
        return (own[0].device, dtype) if own else (None, None)

    def remove(self) -> None:
        """Take this layer off its host."""
        for handle in self._handles:
            handle.remove()
        delattr(self.holder, self.name)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    @property
    def present(self) -> list[str]:
        """The adapters that act here, in order."""
        if self._disable_adapters:
            return []
        return [a for a in self.active_adapters if a in self.sublayer_of and a not in self.merged_adapters]

    def add(
        self,
        y: Tensor,  # shape: (*batch, d_out)
        x: Tensor,  # shape: (*batch, d_in)
    ) -> Tensor:  # shape: (*batch, d_out)
        """Add the outputs of the active sub-layers on x to y."""
        if FORWARD.row_adapters is not None:
            return self.add_by_row(y, x)
        visible = self.visible() if self._padding else None
        for name in self.present:
            y = self.sublayer_of[name].add(y, x, visible)
        return y

    def add_by_row(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.clone()
        for name, rows in self.rows_by_adapter(len(x), x.device):
            y[rows] = self.sublayer_of[name].add(y[rows], x[rows], self.visible_rows(rows, len(x)))
        return y

    def visible(self) -> Tensor | None:  # shape: (batch, keys)
        """The tokens of this block that are no padding; None if no gate needs to know, or nothing is padding."""
        visible, n_keys = FORWARD.values.get(self._padding, (None, 0))
        if not (visible is None or isinstance(visible, Tensor)):
            return visible_tokens(visible)  # which refuses it
        # behind the tokens a cache may have empty keys
        return visible if visible is None or self.site.of_encoder else visible[:, :n_keys]

    def visible_rows(self, rows: Tensor, batch: int) -> Tensor | None:
        visible = self.visible()
        return None if visible is None else visible.expand(batch, -1)[rows]

    def rows_by_adapter(self, batch: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Each adapter of a mixed batch that has a sub-layer here, with its rows.

        Beam search and modules that flatten tokens make several rows of one; they lie side by side.
        """
        adapters = FORWARD.row_adapters or []
        each = batch // len(adapters)
        names = [] if self._disable_adapters else [name for name in adapters for _ in range(each)]
        for name in dict.fromkeys(names):
            if name in self.sublayer_of:
                yield name, torch.tensor([i for i, n in enumerate(names) if n == name], device=device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the sub-layers into the weight or bias of the host.

        Raises:
            ValueError: `safe_merge` finds values that are not finite.
        """
        for name in adapter_names or self.active_adapters:
            if name in self.sublayer_of and name not in self.merged_adapters:
                self._fold(self.sublayer_of[name], sign=1, safe=safe_merge)
                self.merged_adapters = [*self.merged_adapters, name]

    def unmerge(self, keep: Sequence[str] = ()) -> None:
        """Take merged sub-layers out of the host again, all but those of the adapters in `keep`."""
        for name in [name for name in self.merged_adapters if name not in keep]:
            self._fold(self.sublayer_of[name], sign=-1, safe=False)
            self.merged_adapters = [other for other in self.merged_adapters if other != name]

    @torch.no_grad()
    def _fold(self, sublayer: nn.Module, sign: int, safe: bool) -> None:
        base: Any = innermost(self.host)
        if isinstance(sublayer, Bias):
            self._unbiased = self._unbiased or base.bias is None
            bias = torch.zeros_like(sublayer.b) if base.bias is None else base.bias
            base.bias = nn.Parameter(finite(bias + sign * sublayer.b.to(bias), safe), requires_grad=False)
            if self._unbiased and sign < 0 and len(self.merged_adapters) == 1:
                base.bias = None  # as it was before the first was merged
        elif isinstance(sublayer, LowRank):
            self.quantization_backend = resolve_quantization_backend(base)
            weight = self.get_base_weight()
            delta = sublayer.delta_weight().to(weight)
            self.set_base_weight(finite(weight + sign * (delta.T if isinstance(base, Conv1D) else delta), safe))


class NotePadding:
    """Before the attention of a block runs: tell the layers of the block which keys are padding.

    It reads the mask inside the block, so that a block recomputed by gradient checkpointing reads its own mask again.
    """

    def __init__(self, attention: nn.Module):
        self.key = new_key("padding")
        self.keyword, self.position = mask_position(attention)

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get(self.keyword, args[self.position] if len(args) > self.position else None)
        n_keys = 0 if mask is None else cached_tokens(attention, kwargs) + hidden_states(args, kwargs).shape[1]
        known = mask is None or isinstance(mask, Tensor)
        FORWARD.hand_on(self.key, (visible_tokens(mask) if known else mask, n_keys))


def note_padding(attention: nn.Module, block: nn.Module) -> tuple[str, list[RemovableHandle]]:
    """Have an attention module note its mask, if it does not yet, until its block has run.

    Returns:
        The key of the note in `FORWARD.values`, and the new hooks.
    """
    for hook in attention._forward_pre_hooks.values():
        if isinstance(hook, NotePadding):
            return hook.key, []
    note = NotePadding(attention)
    return note.key, [
        attention.register_forward_pre_hook(note, prepend=True, with_kwargs=True),
        block.register_forward_hook(partial(forget_padding, note.key), always_call=True),
    ]


def forget_padding(key: str, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    FORWARD.values.pop(key, None)


def block_of(model: nn.Module, attention: str) -> str:
    """Path of the block of an attention module: its part of the outermost list (blocks of T5 have lists inside)."""
    parts = attention.split(".")
    for i in range(len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1])


def holder_of(site: Site) -> str:
    """Path of the module that has the tuner layer of a site as a child.

    That is the host, but the module in front of a norm: transformers' Trainer exempts from weight decay whatever lies
    inside a norm. A norm that a user names by `sites=` holds the layer itself.
    """
    return site.reads if site.act == "norm" and site.reads else site.host


def child_name(site: str, sublayer: str) -> str:
    """Name of a tuner layer in its holder. Never `<peft type>_...`, which transformers looks for."""
    return "trained_bias" if sublayer == "bias" else f"{site}_{sublayer}"


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module reads: its first argument, however it was passed."""
    return args[0] if args else kwargs["hidden_states"]


def cached_tokens(attention: Any, kwargs: dict[str, Any]) -> int:
    """Number of tokens in the cache before this forward."""
    cache = given_cache(kwargs)
    layer = getattr(attention, "layer_idx", getattr(attention, "layer_id", 0))
    return 0 if cache is None else int(cache.get_seq_length(layer))


def finite(value: Tensor, safe: bool) -> Tensor:
    if safe and not value.isfinite().all():
        raise ValueError("`safe_merge` (=True) found values that are not finite in the merged weight.")
    return value
