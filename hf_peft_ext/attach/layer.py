"""The tuner layer: a child of the module it changes, acting through a hook.

Nothing of the base model is replaced. Its parameter names stay as they are, so nesting, unloading, quantised leaves
and mixture-of-experts blocks need no code of their own. The four layers below act outside attention; those with a
prefix are in `attention.py` and `cache_prefix.py`. `SharedLayer` holds what other layers share.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_peft_ext.attach.forward_state import FORWARD, hidden_states, new_key
from hf_peft_ext.attach.hook_order import move_first
from hf_peft_ext.attach.lora_conversion import LoraConversion
from hf_peft_ext.attach.masks import UNMASKED, block_of, record_padding
from hf_peft_ext.attach.merge import merge_sublayer
from hf_peft_ext.model.site import Site


class TunerLayer(LoraConversion, nn.Module, BaseTunerLayer):
    """The sub-layers, one for each adapter, at one site.

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
        self.adds_bias = False  # whether a merged sub-layer gave the host a bias that it did not have
        self._host = (model.get_submodule(site.host),)  # in a tuple: not a child
        self._holder = (model.get_submodule(holder_of(site)),)
        # the attention whose mask covers the tokens read here, and its block; none for sites outside the blocks
        paths = (site.attention, block_of(model, site.attention)) if site.attention else ()
        self._attention = tuple(model.get_submodule(path) for path in paths)
        self._mask_key: str | None = None  # key of the padding masks in `FORWARD.values`, if a gate needs one
        self._mask_index = int(site.of_encoder)  # torch.compile indexes by no bool before torch 2.12
        self._handles: list[RemovableHandle] = self.hooks(model)

    @abstractmethod
    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook this layer to the modules that its site reads and changes."""

    def forward(self, x: Tensor) -> Tensor:
        """x itself, for hosts that run their children in turn."""
        return x

    @property
    def host(self) -> nn.Module:
        """The module whose call this layer changes."""
        return self._host[0]

    @property
    def holder(self) -> nn.Module:
        """The module that has this layer as a child (see `holder_of`)."""
        return self._holder[0]

    def get_base_layer(self) -> nn.Module:
        """The host, as peft calls it."""
        return self.host

    def put(self, adapter_name: str, sublayer: nn.Module) -> None:
        """Add the sub-layer of an adapter, on the device and in the type of the host, and in this layer's mode."""
        self.sublayer_of[adapter_name] = sublayer.train(self.training)
        gate: Any = getattr(sublayer, "gate", None)
        if gate is not None and gate.pooling == "mean" and self._attention and self._mask_key is None:
            self._mask_key, handles = record_padding(*self._attention)
            self._handles += handles
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        own = [p for name, p in base_layer.named_parameters() if "sublayer_of." not in name and not p.is_meta]
        types = (p.dtype for p in own if p.dtype.is_floating_point)
        dtype = getattr(base_layer, "compute_dtype", None) or next(types, None)
        return (own[0].device, dtype) if own else (None, None)

    def drop(self, adapter_name: str) -> None:
        """Remove the sub-layer of an adapter, if there is one."""
        if adapter_name in self.sublayer_of:
            self.sublayer_of.pop(adapter_name)

    def remove(self) -> None:
        """Take this layer off its host."""
        for handle in self._handles:
            handle.remove()
        delattr(self.holder, self.name)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all sub-layers. Disabling unmerges them."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    @property
    def active_here(self) -> dict[str, Any]:
        """Active adapter -> its sub-layer, without merged ones."""
        active = {}
        if not self._disable_adapters:
            for name in self.active_adapters:
                if name in self.sublayer_of and name not in self.merged_adapters:
                    active[name] = self.sublayer_of[name]
        return active

    def add(
        self,
        y: Tensor,  # shape: (*batch, d_out)
        x: Tensor,  # shape: (*batch, d_in)
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:  # shape: (*batch, d_out)
        """y + the outputs of the active sub-layers on x; with `read`, each after the first reads read(y) instead."""
        if FORWARD.row_adapters is not None:
            return self.add_by_row(y, x)
        token_mask = FORWARD.values.get(self._mask_key, UNMASKED)[self._mask_index]
        for index, sublayer in enumerate(self.active_here.values()):
            y = sublayer.add(y, read(y) if read and index else x, token_mask)
        return y

    def add_by_row(self, y: Tensor, x: Tensor) -> Tensor:
        """As `add`, with its own adapter for each row."""
        y = y.clone()
        for name, rows in self.rows_by_adapter(len(x), x.device):
            y[rows] = self.sublayer_of[name].add(y[rows], x[rows], self.token_mask(rows, len(x)))
        return y

    def token_mask(self, rows: Tensor, batch: int) -> Tensor | None:  # shape: (rows, keys)
        """False where a key of these rows is padding; None if no gate needs it, or nothing is padding."""
        mask = FORWARD.values.get(self._mask_key, UNMASKED)[self._mask_index]
        return mask.expand(batch, -1)[rows] if isinstance(mask, Tensor) else mask

    def rows_by_adapter(self, batch: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Each adapter of a mixed batch that has a sub-layer here, with the indices of its rows.

        Beam search and modules that flatten tokens repeat each row; its copies are adjacent.
        """
        adapters = FORWARD.row_adapters or []
        copies = batch // len(adapters)
        names = [] if self._disable_adapters else [name for name in adapters for _ in range(copies)]
        for name in dict.fromkeys(names):
            if name in self.sublayer_of:
                yield name, torch.tensor([i for i, n in enumerate(names) if n == name], device=device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge sub-layers into the weight or bias of the host.

        Raises:
            ValueError: `safe_merge` finds values that are not finite.
        """
        for name in adapter_names or self.active_adapters:
            if name in self.sublayer_of and name not in self.merged_adapters:
                merge_sublayer(self, self.sublayer_of[name], sign=1, safe=safe_merge)
                self.merged_adapters = [*self.merged_adapters, name]

    def unmerge(self, keep: Sequence[str] = ()) -> None:
        """Take merged sub-layers out of the host again, all but those of the adapters in `keep`."""
        for name in [name for name in self.merged_adapters if name not in keep]:
            merge_sublayer(self, self.sublayer_of[name], sign=-1, safe=False)
            self.merged_adapters = [other for other in self.merged_adapters if other != name]


def holder_of(site: Site) -> str:
    """Path of the module that has the tuner layer of a site as a child.

    That is the host. For a norm it is the module in front of it: transformers' Trainer exempts everything inside a
    norm from weight decay. A norm that a user names by `sites=` holds the layer itself.
    """
    return site.reads if site.act == "norm" and site.reads else site.host


def child_name(site: str, sublayer: str) -> str:
    """Name of a tuner layer in its holder. Never `<peft type>_...`, which transformers looks for."""
    return "trained_bias" if sublayer == "bias" else f"{site}_{sublayer}"


NORM_BIAS = child_name("bias", "bias")


class AddToOutput(TunerLayer):
    """y = host(x) becomes y + f(y): sequential adapters and biases, stacked in the order of the active adapters."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        # before the host's other hooks, which record a block's output (hidden states) or read a module with its bias
        handle = self.host.register_forward_hook(partial(add_to_output, self.name))
        if self.site.name in ("bias", "after_residual", "block_output"):
            move_first(self.host._forward_hooks, handle)
        return [handle]


def add_to_output(name: str, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    y = output[0] if isinstance(output, tuple) else output
    changed = getattr(host, name).add(y, y, read=lambda y: y)
    return with_first(output, changed) if isinstance(output, tuple) else changed


class AddOfInput(TunerLayer):
    """y = host(x) becomes y + f(x): low-rank updates of a leaf, adapters parallel to a module."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        return [self.host.register_forward_hook(partial(add_of_input, self.name), with_kwargs=True)]


def add_of_input(name: str, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    layer, x = getattr(host, name), args[0] if args else kwargs["hidden_states"]
    if isinstance(output, tuple):
        return with_first(output, layer.add(output[0], x))
    return layer.add(output, x)


class AddBeforeNorm(TunerLayer):
    """norm(s) becomes norm(s + f(norm(s))): Pfeiffer's place, where s is the FFN's output plus the residual.

    The layer is a child of the module in front of the norm (see `holder_of`), which hands it to the hook of the norm.
    That module is inside the block: hooks of the block itself do not run again under gradient checkpointing.
    """

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        key = new_key(self.site.host)
        return [
            self.holder.register_forward_pre_hook(partial(hand_layer, key, self.name)),
            self.host.register_forward_hook(partial(add_before_norm, key), with_kwargs=True),
        ]


def hand_layer(key: str, name: str, holder: nn.Module, args: tuple[Any, ...]) -> None:
    FORWARD.hand_on(key, getattr(holder, name))


def add_before_norm(key: str, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    layer, s = FORWARD.values.pop(key), args[0] if args else kwargs["hidden_states"]
    changed = layer.add(s, output, read=partial(normed, norm))
    if changed is s:
        return output
    output, bias = norm.forward(changed), getattr(norm, NORM_BIAS, None)  # as `normed`, without a call of its own
    return output if bias is None else bias.add(output, output)


def normed(norm: Any, s: Tensor) -> Tensor:
    """norm(s), with the trained bias that a hook of its own adds to the first output."""
    output, bias = norm.forward(s), getattr(norm, NORM_BIAS, None)
    return output if bias is None else bias.add(output, output)


class AddOfSpan(TunerLayer):
    """y = last(... first(x)) becomes y + f(x), where x enters one module and y leaves another."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        key, first = new_key(self.site.host), model.get_submodule(self.site.reads)
        return [
            first.register_forward_pre_hook(partial(hand_input, key), with_kwargs=True),
            self.host.register_forward_hook(partial(add_of_span, key, self.name)),
        ]


def hand_input(key: str, first: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    FORWARD.hand_on(key, hidden_states(args, kwargs))


def add_of_span(key: str, name: str, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    layer, x = getattr(host, name), FORWARD.values.pop(key)
    if isinstance(output, tuple):
        return with_first(output, layer.add(output[0], x))
    return layer.add(output, x)


class SharedLayer(TunerLayer):
    """Holds what the sub-layers of an adapter share, as a child of the whole model. It acts on nothing.

    The whole model, because FSDP gathers a block's parameters for that block alone, but those of the model itself for
    the whole forward and backward.
    """

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        return []


SHARED = Site("shared", None, "", "shared", 0, 0)


def with_first(output: tuple[Any, ...], first: Tensor) -> Any:
    """A tuple, named or not, with another first element."""
    make: Any = getattr(output, "_make", tuple)
    return make((first, *output[1:]))
