"""The tuner layer of sparse fine-tuning: hooks on all modules with selected parameters add what the entries change."""

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.structure import innermost, leaf_size
from hf_peft_ext.tuners.sparse.deltas import SparseDelta
from hf_peft_ext.tuners.sparse.product import dense, embedding_delta, linear_delta, with_deltas
from hf_peft_ext.tuners.sparse.targets import SparseTarget, is_packed

LAYER_NAME = "parameter_deltas"  # among the children of the first module with parameters

Parts = dict[str, tuple[Tensor, Tensor | None, torch.Size]]  # parameter -> values, indices (None: dense) and shape


class SparseLayer(nn.Module, BaseTunerLayer):
    """The sparse differences of a model's parameters, one for each adapter.

    Args:
        host: the module that has this layer as a child.
    """

    adapter_layer_names = ("deltas_of",)
    other_param_names = ("targets_of",)

    deltas_of: Any  # adapter name -> SparseDelta

    def __init__(self, host: nn.Module):
        super().__init__()
        self.deltas_of = nn.ModuleDict()
        self.targets_of: dict[str, list[SparseTarget]] = {}
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self._host = (host,)  # in a tuple: not a child
        self._hosts: dict[str, nn.Module] = {}  # path -> module with a hook
        self._places: dict[str, dict[str, list[tuple[str, int]]]] = {}  # adapter -> path -> (parameter, target)
        self._replaced: list[tuple[nn.Parameter, Any, Tensor]] = []  # parameter, places and their values before
        self._handles: list[RemovableHandle] = []

    def get_base_layer(self) -> nn.Module:
        """The module that has this layer as a child."""
        return self._host[0]

    def put(self, adapter_name: str, delta: SparseDelta, targets: list[SparseTarget], model: nn.Module) -> None:
        """Add the differences of an adapter, and hooks on the modules of its targets."""
        self.deltas_of[adapter_name] = delta
        self.targets_of[adapter_name] = targets
        places = self._places[adapter_name] = {}
        for i, target in enumerate(targets):
            for path, name in target.uses:
                places.setdefault(path, []).append((name, i))
        for path in places:
            if path not in self._hosts:
                self._hosts[path] = module = innermost(model.get_submodule(path))
                hook = partial(add_deltas, self, path)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        own = [p for name, p in base_layer.named_parameters() if "deltas_of." not in name and not p.is_meta]
        types = (p.dtype for p in own if p.dtype.is_floating_point)
        return (own[0].device, next(types, None)) if own else (None, None)

    def remove(self) -> None:
        """Take this layer off the model."""
        for handle in self._handles:
            handle.remove()
        delattr(self.get_base_layer(), LAYER_NAME)

    def drop(self, adapter_name: str) -> None:
        """Remove an adapter, if it is there."""
        if adapter_name in self.deltas_of:
            del self.deltas_of[adapter_name], self.targets_of[adapter_name], self._places[adapter_name]

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the differences. Disabling unmerges them."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def parts(self, path: str) -> Parts:
        """The differences of the active adapters at a module, by the names of its parameters."""
        parts: Parts = {}
        for adapter in self.active_adapters:
            if self._disable_adapters or adapter in self.merged_adapters or adapter not in self.deltas_of:
                continue
            delta, targets = self.deltas_of[adapter], self.targets_of[adapter]
            for name, i in self._places[adapter].get(path, ()):
                if delta.search is not None:
                    parts[name] = joined_deltas(parts.get(name), (delta.search(i), None, targets[i].shape))
                elif delta.is_selected:
                    values, index = delta.segment(i)
                    if len(values):
                        parts[name] = joined_deltas(parts.get(name), (values, index, targets[i].shape))
                elif self.training and torch.is_grad_enabled() and delta.values.requires_grad:
                    raise RuntimeError(unselected(adapter))
        return parts

    # Merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the differences of adapters to the parameters.

        Raises:
            ValueError: a weight is quantized, or `safe_merge` finds values that are not finite.
        """
        names = [name for name in adapter_names or self.active_adapters if name not in self.merged_adapters]
        for name in [name for name in names if name in self.deltas_of]:
            segments = [(target, *self.deltas_of[name].segment(i)) for i, target in enumerate(self.targets_of[name])]
            changes = [self._change(*segment) for segment in segments if len(segment[1])]
            if safe_merge and not all(after.isfinite().all() for *_, after in changes):
                raise ValueError("`safe_merge` (=True) found values that are not finite in the merged weight.")
            for parameter, place, after in changes:
                self._replaced.append((parameter, place, parameter.data[place]))
                parameter.data[place] = after
            self.merged_adapters = [*self.merged_adapters, name]

    def _change(self, target: SparseTarget, values: Tensor, index: Tensor) -> tuple[nn.Parameter, Any, Tensor]:
        """A target's parameter, the places of its entries, and their values with the differences added."""
        path, parameter_name = target.uses[0]
        module = self._hosts[path]
        if parameter_name == "weight" and is_packed(module):
            raise ValueError(
                f"The weight of {path} is quantized, so its entries cannot be merged; dequantize it first."
            )
        parameter = module.get_parameter(parameter_name)
        place = torch.unravel_index(index.to(parameter.device), target.shape)
        before = parameter.data[place]
        return parameter, place, (before + values.to(before.device)).to(before.dtype)

    def unmerge(self) -> None:
        """Give the entries of merged adapters their values back, exactly."""
        for parameter, place, before in reversed(self._replaced):
            parameter.data[place] = before
        self._replaced, self.merged_adapters = [], []


def joined_deltas(one: Any, other: Any) -> Any:
    """The differences of two adapters at one parameter."""
    if one is None:
        return other
    if one[1] is not None and other[1] is not None:
        return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]), one[2]
    first, second = (v if i is None else dense(v, i, shape) for v, i, shape in (one, other))
    return first + second, None, one[2]


def unselected(adapter_name: str) -> str:
    """The error for training before the entries are selected."""
    return (
        f"The sparse adapter {adapter_name!r} has no selected entries yet. Call `select_sparse_parameters`, or train "
        "by a trainer of `hf_peft_ext.trainers`, which selects them first."
    )


def add_deltas(
    layer: SparseLayer, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Hook of a module: its output with the differences of its parameters."""
    parts = layer.parts(path)
    if not parts:
        return output
    x = args[0] if args else next(iter(kwargs.values()))
    if leaf_size(module) is not None and set(parts) <= {"weight", "bias"}:
        for values, index, shape in (parts[name] for name in ("weight", "bias") if name in parts):
            output = output + linear_change(module, x, values, index, shape).to(output.device, output.dtype)
        return output
    if type(module).forward is nn.Embedding.forward:
        values, index, shape = parts["weight"]
        if index is not None:
            added = embedding_delta(x, values.to(x.device), index.to(x.device), shape[1])
            return output + added.to(output.dtype)
    deltas = {n: v if index is None else dense(v, index, shape) for n, (v, index, shape) in parts.items()}
    device = next(module.parameters()).device
    changed = with_deltas(module, {name: delta.to(device) for name, delta in deltas.items()}, args, kwargs)
    return tree_map(lambda new, old: new.to(old.dtype) if isinstance(new, Tensor) else new, changed, output)


def linear_change(module: nn.Module, x: Tensor, values: Tensor, index: Tensor | None, shape: torch.Size) -> Tensor:
    """What differences of the weight or the bias of a linear leaf add to its output."""
    values = values.to(x.device)
    if len(shape) == 1:
        return values if index is None else dense(values, index.to(x.device), shape)
    if index is not None:
        return linear_delta(module, x, values, index.to(x.device), shape)
    weight = values.T if isinstance(module, Conv1D) else values
    return F.linear(x.to(torch.promote_types(x.dtype, weight.dtype)), weight)
