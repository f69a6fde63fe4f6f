"""The tuner layer of one parameter: a parametrization of torch that adds the projected vector to it."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_peft_ext.attach.merge import finite
from hf_peft_ext.tuners.intrinsic.subspace import Subspace


class IntrinsicLayer(nn.Module, BaseTunerLayer):
    """theta_i = theta_0,i + lambda_i P_i theta_d, wherever a module reads its parameter theta_i.

    A parametrization reaches every kind of module: convolutions, norms, embeddings, and modules that hand their
    weights to a kernel. The sum is computed at each access and stored nowhere, so that threads, checkpointing and
    several forwards for a backward need nothing else.

    Args:
        host: the module.
        name: name of its parameter.
    """

    adapter_layer_names = ("intrinsic_subspace",)
    other_param_names = ("intrinsic_projection", "subspaces", "scale_indices", "tied")

    intrinsic_subspace: Any  # adapter name -> Subspace, at one layer of each adapter
    intrinsic_projection: Any  # adapter name -> projection

    def __init__(self, host: nn.Module, name: str):
        super().__init__()
        self.intrinsic_subspace = nn.ModuleDict()
        self.intrinsic_projection = nn.ModuleDict()
        self.subspaces: dict[str, Subspace] = {}  # those of all layers; in a plain dict, so that they are no children
        self.scale_indices: dict[str, int] = {}
        self.tied: dict[str, bool] = {}  # whether another layer merges the adapter into this parameter
        self.name = name
        self._host = (host,)  # in a tuple, so that it is no child
        self._active_adapter = []
        self.merged_adapters = []

    def get_base_layer(self) -> nn.Module:
        """The module that has the parameter."""
        return self._host[0]

    @property
    def original(self) -> Tensor:
        """theta_0,i."""
        host: Any = self.get_base_layer()
        return host.parametrizations[self.name].original

    def put(
        self,
        adapter_name: str,
        projection: nn.Module,
        subspace: Subspace,
        scale_index: int,
        is_owner: bool,
        is_tied: bool,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: the adapter.
            projection: P_i.
            subspace: theta_d.
            scale_index: index of lambda_i.
            is_owner: whether the subspace becomes a part of this layer.
            is_tied: whether another layer has the same parameter, and merges the adapter.
        """
        self.intrinsic_projection[adapter_name] = projection
        self.subspaces[adapter_name] = subspace
        self.scale_indices[adapter_name] = scale_index
        self.tied[adapter_name] = is_tied
        if is_owner:
            self.intrinsic_subspace[adapter_name] = subspace
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.original.device, self.original.dtype

    def forward(self, original: Tensor) -> Tensor:
        """The parameter with the active adapters; itself if there is none."""
        names = () if self._disable_adapters else self.active_adapters
        return self.add(original, [name for name in names if name not in self.merged_adapters])

    def add(self, parameter: Tensor, names: Sequence[str], sign: int = 1) -> Tensor:
        """parameter + sign * the sum of the updates of these adapters, in the type of the parameter."""
        total = parameter
        for name in names:
            if name in self.intrinsic_projection:
                total = total + sign * self.delta(name).view_as(parameter)
        return total.to(parameter.dtype)

    def delta(self, adapter_name: str) -> Tensor:  # shape: (size of the parameter,)
        """lambda_i P_i theta_d, in single or double precision also under autocast."""
        subspace, device = self.subspaces[adapter_name], self.original.device
        precise = torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()
        with precise:
            delta = self.intrinsic_projection[adapter_name](subspace.coordinates().to(device))
            scale = subspace.scale(self.scale_indices[adapter_name])
            return delta * scale.to(device) if isinstance(scale, Tensor) else delta

    def drop(self, adapter_name: str) -> None:
        """Remove an adapter, if it is there."""
        if adapter_name in self.subspaces:
            self.delete_adapter(adapter_name)

    def remove(self) -> None:
        """Take this layer off its parameter."""
        host: Any = self.get_base_layer()
        original, cls = self.original, type(host)
        # deep copies of the module share its class, and torch removes the property of the parameter from the class
        host.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
        parametrize.remove_parametrizations(host, self.name, leave_parametrized=False)
        host._parameters[self.name] = cast(nn.Parameter, original)  # as in `attach_layer`

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters. Disabling unmerges them."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the parameter itself.

        Raises:
            ValueError: `safe_merge` finds values that are not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.intrinsic_projection:
                if not self.tied[name]:
                    self.original.data = finite(self.add(self.original, [name]), safe_merge)
                self.merged_adapters = [*self.merged_adapters, name]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged updates from the parameter again."""
        for name in reversed(self.merged_adapters):
            if not self.tied[name]:
                self.original.data = self.add(self.original, [name], sign=-1)
        self.merged_adapters = []


def intrinsic_layer(host: Any, name: str) -> IntrinsicLayer | None:
    """The tuner layer of a module's parameter, if it has one."""
    if not parametrize.is_parametrized(host, name):
        return None
    return next((layer for layer in host.parametrizations[name] if isinstance(layer, IntrinsicLayer)), None)


def attach_layer(host: Any, name: str) -> IntrinsicLayer:
    """The tuner layer of a module's parameter, made if it is missing."""
    layer = intrinsic_layer(host, name)
    if layer is None:
        layer, original = IntrinsicLayer(host, name), host._parameters[name]
        parametrize.register_parametrization(host, name, layer, unsafe=True)  # type and shape stay; no trial is needed
        # peft's `low_cpu_mem_usage` sends all parameters that are registered meanwhile to the meta device
        host.parametrizations[name]._parameters["original"] = original
    return layer
