"""The tensors of a model's active adapters, and the dimensions of each that run along the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.pruning.channels import RESIDUAL
from hf_peft_ext.sublayers import Bottleneck, LowRank, Prefix
from hf_peft_ext.transfer.map.projections import Side
from hf_peft_ext.validation.checks import check

HEAD = -1  # the layer of a module that is trained outside the blocks
# The space of a leaf's input, and of its output, where it is not the residual stream.
INPUT_SPACES = {"attention_output": "heads", "ffn_output": "ffn"}
OUTPUT_SPACES = {"query": "query", "key": "key", "value": "value", "ffn_input": "ffn", "ffn_gate": "ffn"}


@dataclass(frozen=True)
class Axis:
    """A dimension of a tensor that runs along the model.

    Args:
        dim: which dimension; None for the heads of a prefix: (heads, n, d) runs along heads x d.
        side: "in" if the sub-layer's input has this dimension, "out" if its output has it.
        rows: space -> its indices along this dimension; None for all of them.
    """

    dim: int | None
    side: Side
    rows: dict[str, Tensor | None]

    def size(self, value: Tensor) -> int:
        """The size of a tensor along this axis."""
        return value.shape[0] * value.shape[2] if self.dim is None else value.shape[self.dim]


@dataclass(frozen=True)
class AdapterTensor:
    """A tensor of an adapter.

    Args:
        adapter: the adapter's name.
        layer: the layer that it acts in, `HEAD` outside the blocks.
        sites: names of the sites that it acts at, several in a fused projection.
        tensor: its name in the sub-layer.
        owner, name: the module and the attribute that hold it.
        axes: its dimensions that run along the model.
        host: path of the module at which the sub-layer acts.
        site: its site, for sub-layers of this package.
    """

    adapter: str
    layer: int
    sites: frozenset[str]
    tensor: str
    owner: nn.Module
    name: str
    axes: tuple[Axis, ...]
    host: str
    site: Site | None = None

    @property
    def value(self) -> Tensor:
        """The tensor now; a parametrized one is computed."""
        return getattr(self.owner, self.name)

    @property
    def key(self) -> tuple[str, str, str, frozenset[str]]:
        """Unique among the tensors of a model, and the same in its pruned copy."""
        return self.adapter, self.host, self.tensor, self.sites

    def corresponds_to(self, other: "AdapterTensor", layer: int) -> bool:
        """Whether `other`, a tensor of another model in the corresponding `layer`, has the same role."""
        same = other.adapter == self.adapter and other.layer == layer and other.tensor == self.tensor
        return same and self.sites <= other.sites


class AdapterTensors:
    """The tensors of all active adapters of a model. Read them once for a model, and hand them on.

    They stay valid when tensors are parametrized or merged, but not when adapters are added, removed or activated.

    Args:
        model: a model with LoRAs, or with adapters of this package without biases and reparameterised prefixes.

    Raises:
        TypeError: an adapter is of another kind.
        ValueError: no adapter is active, or one has a part that cannot be carried to another model.
    """

    def __init__(self, model: PeftModel):
        self.model = model
        self.adapters = list(model.active_adapters)
        check("active_adapters", self.adapters, bool(self.adapters), "must hold at least one adapter")
        self._all = [tensor for name in self.adapters for tensor in read_adapter(model, name)]

    def __iter__(self) -> Iterator[AdapterTensor]:
        return iter(self._all)

    def by_key(self) -> dict[tuple[str, str, str, frozenset[str]], AdapterTensor]:
        """`AdapterTensor.key` -> tensor."""
        return {tensor.key: tensor for tensor in self}

    def added(self) -> list[AdapterTensor]:
        """The tensors in the blocks that multiply the whole output of a sub-layer: LoRA's B, up-projections."""
        return [
            tensor
            for tensor in self
            if tensor.layer != HEAD and any(axis.side == "out" and axis.dim is not None for axis in tensor.axes)
        ]

    @property
    def has_prefix(self) -> bool:
        """Whether an adapter has a prefix, which cannot be scaled."""
        return any(axis.dim is None for tensor in self for axis in tensor.axes)


def read_adapter(model: PeftModel, adapter: str) -> Iterator[AdapterTensor]:
    """The tensors of one adapter of a model."""
    config: Any = model.peft_config[adapter]
    base = model.get_base_model()
    if isinstance(config, PlacedConfig):
        yield from placed_tensors(base, adapter)
    elif config.peft_type == PeftType.LORA:
        check_plain_lora(config)
        yield from lora_tensors(base, adapter)
    else:
        kind = config.peft_type.value
        raise TypeError(f"`model` has an adapter of type {kind}; LORA, BOTTLENECK and LAYER_PREFIX can be plugged in.")
    yield from head_tensors(base, adapter)


def check_plain_lora(config: Any) -> None:
    """Refuse a LoRA with more than A and B."""
    rule = "cannot be carried to another model; train the small one without"
    for field in ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication"):
        value = getattr(config, field, None)
        check(field, value, not value, rule)
    check("bias", config.bias, config.bias == "none", rule)


def lora_tensors(base: nn.Module, adapter: str) -> Iterator[AdapterTensor]:
    """A and B of a LoRA, leaf by leaf."""
    sites = leaf_sites(base)
    for path, module in own_modules(base):
        if isinstance(module, LoraLayer) and adapter in module.r:
            check(
                "target_modules", path, path in sites and adapter in module.lora_A, "must be a linear leaf of a block"
            )
            here = sites[path]
            inputs: dict[str, Tensor | None] = {space_of(here[0], "in"): None}
            outputs = {space_of(site, "out"): site.rows for site in here}
            layer, names = here[0].layer, frozenset(site.name for site in here)
            assert layer is not None
            for tensor, owner, axis in (
                ("A", module.lora_A[adapter], Axis(1, "in", inputs)),
                ("B", module.lora_B[adapter], Axis(0, "out", outputs)),
            ):
                yield AdapterTensor(adapter, layer, names, tensor, owner, "weight", (axis,), path)


def leaf_sites(model: nn.Module) -> dict[str, list[Site]]:
    """Path of each linear leaf of the blocks -> its sites, several in a fused projection."""
    sites: dict[str, list[Site]] = {}
    for site in find_sites(model):
        name = site.name.removeprefix("cross_")
        if site.act == "input" and site.layer is not None and name in {*INPUT_SPACES, *OUTPUT_SPACES}:
            sites.setdefault(site.host, []).append(site)
    return sites


def placed_tensors(base: nn.Module, adapter: str) -> Iterator[AdapterTensor]:
    """The tensors of the sub-layers of an adapter of this package."""
    for layer in tuner_layers(base):
        if adapter not in layer.sublayer_of:
            continue
        sublayer: Any = layer.sublayer_of[adapter]
        site, kind = layer.site, type_before_parametrizations(sublayer).__name__
        portable = type_before_parametrizations(sublayer) in (LowRank, Bottleneck, Prefix)
        rule = f"holds a {kind} at {site.host}, which cannot be carried to another model"
        check("adapter_name", adapter, portable and site.layer is not None, rule)
        assert site.layer is not None
        axes = axes_of(site)
        for path in tensor_names(sublayer):
            owner, _, name = path.rpartition(".")
            along, module = axes.get(path, ()), sublayer.get_submodule(owner)
            yield AdapterTensor(
                adapter, site.layer, frozenset([site.name]), f"{kind}.{path}", module, name, along, site.host, site
            )


def axes_of(site: Site) -> dict[str, tuple[Axis, ...]]:
    """Tensor of a sub-layer at this site -> its dimensions that run along the model; others have none."""
    inputs: dict[str, Tensor | None] = {space_of(site, "in"): None}
    outputs: dict[str, Tensor | None] = {space_of(site, "out"): None}
    cross = "cross_" if site.name.startswith("cross_") else ""
    return {
        "A": (Axis(1, "in", inputs),),
        "B": (Axis(0, "out", outputs),),
        "down.weight": (Axis(1, "in", inputs),),
        "up.weight": (Axis(0, "out", outputs),),
        "up.bias": (Axis(0, "out", outputs),),
        "gate.weight": (Axis(1, "in", inputs),),
        "P_K": (Axis(None, "out", {f"{cross}key": None}),),
        "P_V": (Axis(None, "out", {f"{cross}value": None}),),
    }


def tensor_names(module: nn.Module, path: str = "") -> Iterator[str]:
    """Names of the parameters of a module; a parametrized one has its own name, not that of its original."""
    for name, value in module._parameters.items():
        if value is not None:
            yield path + name
    if is_parametrized(module):
        yield from (path + name for name in module.parametrizations)  # pyright: ignore
    for name, child in module.named_children():
        if name != "parametrizations":
            yield from tensor_names(child, f"{path}{name}.")


def space_of(site: Site, side: Side) -> str:
    """The space of the input or of the output of a sub-layer at this site."""
    cross = "cross_" if site.name.startswith("cross_") else ""
    name = (INPUT_SPACES if side == "in" else OUTPUT_SPACES).get(site.name.removeprefix("cross_"))
    return cross + name if name else RESIDUAL


def head_tensors(base: Any, adapter: str) -> Iterator[AdapterTensor]:
    """The tensors of modules that are trained whole, such as a classification head on the residual stream."""
    d = base.config.get_text_config().hidden_size
    for path, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            head = module.modules_to_save[adapter]
            for tensor in tensor_names(head):
                owner, _, name = tensor.rpartition(".")
                whole = head.get_submodule(owner)
                axes = tuple(
                    Axis(dim, "in" if dim else "out", {RESIDUAL: None})
                    for dim, size in enumerate(getattr(whole, name).shape)
                    if size == d
                )
                yield AdapterTensor(adapter, HEAD, frozenset([path]), tensor, whole, name, axes, path)
