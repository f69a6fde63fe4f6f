"""The tensors of an adapter, and which of their dimensions lie along the model that it is made for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.model.sites import Site, find_sites
from hf_peft_ext.model.structure import own_modules
from hf_peft_ext.sublayers import Bottleneck, LowRank, Prefix, ProjectedPrefix
from hf_peft_ext.transfer.map.projections import RESIDUAL, Side
from hf_peft_ext.validation.checks import check

SEEN = "seen_"  # begins the names of modules that compute a tensor, in front of the tensor's (see `seen`)
HEAD = -1  # the layer of what is trained outside the blocks
# The space that a leaf's input lies in, where it is not the residual stream, and that of its output.
READS = {"attention_output": "heads", "ffn_output": "ffn"}
WRITES = {"query": "query", "key": "key", "value": "value", "ffn_input": "ffn", "ffn_gate": "ffn"}


@dataclass(frozen=True)
class Axis:
    """A dimension of a tensor that lies along the model.

    Args:
        dim: which one; None for heads: (heads, n, d) lies along heads x d.
        side: whether the tensor reads from there or writes there.
        rows: space -> the indices along this dimension that are its; None for all.
    """

    dim: int | None
    side: Side
    rows: dict[str, Tensor | None]


@dataclass(frozen=True)
class Part:
    """A tensor of an adapter.

    Args:
        layer: the layer that it acts in, `HEAD` outside the blocks.
        sites: the sites that it acts at, several in a fused projection.
        tensor: its name in the sub-layer.
        owner, name: the module and the attribute that hold it.
        axes: its dimensions that lie along the model.
        host: path of the module that the sub-layer sits at.
        site: its site, if it is one of this package.
    """

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
        return getattr(self.owner, self.name)

    @property
    def key(self) -> tuple[str, str, frozenset[str]]:
        """What no other tensor of the adapter has."""
        return self.host, self.tensor, self.sites

    def takes_from(self, other: "Part", layer: int) -> bool:
        """Whether this tensor can be made of `other`, a tensor of another model, whose layer corresponds."""
        return other.layer == layer and other.tensor == self.tensor and self.sites <= other.sites


def parts_of(model: PeftModel, adapter_name: str | None = None) -> list[Part]:
    """The tensors of an adapter: a LoRA, or one of this package's own without biases and reparameterised prefixes.

    Args:
        adapter_name: the adapter; None for the active one.

    Raises:
        TypeError: the adapter is of another kind.
        ValueError: the adapter has something that cannot be carried to another model.
    """
    name: Any = model.active_adapter if adapter_name is None else adapter_name
    check("adapter_name", name, name in model.peft_config, f"must be one of {list(model.peft_config)}")
    config: Any = model.peft_config[name]
    base = model.get_base_model()
    if isinstance(config, PlacedConfig):
        found = list(placed_parts(base, name))
    elif config.peft_type == PeftType.LORA:
        check_plain(config)
        found = list(lora_parts(base, name))
    else:
        kind = config.peft_type.value
        raise TypeError(f"`model` has an adapter of type {kind}; LORA, BOTTLENECK and LAYER_PREFIX can be plugged in.")
    return found + list(head_parts(base, name))


def check_plain(config: Any) -> None:
    """Refuse what a LoRA may have beside A and B."""
    for field in ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication"):
        value = getattr(config, field, None)
        check(field, value, not value, "cannot be carried to another model; train the small one without")
    check(
        "bias", config.bias, config.bias == "none", "cannot be carried to another model; train the small one without"
    )


def lora_parts(base: nn.Module, name: str) -> Iterator[Part]:
    sites: dict[str, list[Site]] = {}
    for site in find_sites(base):
        if site.act == "input" and site.name.removeprefix("cross_") in {*READS, *WRITES}:
            sites.setdefault(site.host, []).append(site)
    for path, module in own_modules(base):
        if isinstance(module, LoraLayer) and name in module.r:
            check("target_modules", path, path in sites and name in module.lora_A, "is no leaf of a block")
            here = sites[path]
            reads: dict[str, Tensor | None] = {space(here[0], "read"): None}
            writes = {space(site, "write"): site.rows for site in here}
            yield part(here, "A", module.lora_A[name], "weight", (Axis(1, "read", reads),))
            yield part(here, "B", module.lora_B[name], "weight", (Axis(0, "write", writes),))


def placed_parts(base: nn.Module, name: str) -> Iterator[Part]:
    for layer in tuner_layers(base):
        if name not in layer.sublayer_of:
            continue
        sublayer: Any = layer.sublayer_of[name]
        rule = f"holds a {type(sublayer).__name__} at {layer.site.host}, which cannot be carried to another model"
        known = isinstance(sublayer, LowRank | Bottleneck | Prefix) and not isinstance(sublayer, ProjectedPrefix)
        check("adapter_name", name, known and layer.site.layer is not None, rule)
        for tensor, axes in axes_of(layer.site, sublayer).items():
            owner, _, attribute = tensor.rpartition(".")
            kind = type(sublayer).__name__
            yield part([layer.site], f"{kind}.{tensor}", sublayer.get_submodule(owner), attribute, axes)


def axes_of(site: Site, sublayer: nn.Module) -> dict[str, tuple[Axis, ...]]:
    """Tensor of a sub-layer -> its dimensions that lie along the model."""
    reads: dict[str, Tensor | None] = {space(site, "read"): None}
    writes: dict[str, Tensor | None] = {space(site, "write"): None}
    found: dict[str, tuple[Axis, ...]] = {name: () for name in tensors_of(sublayer)}
    cross = "cross_" if site.name.startswith("cross_") else ""
    along = {
        "A": Axis(1, "read", reads),
        "B": Axis(0, "write", writes),
        "down.weight": Axis(1, "read", reads),
        "up.weight": Axis(0, "write", writes),
        "up.bias": Axis(0, "write", writes),
        "gate.weight": Axis(1, "read", reads),
        "P_K": Axis(None, "write", {f"{cross}key": None}),
        "P_V": Axis(None, "write", {f"{cross}value": None}),
    }
    return found | {name: (along[name],) for name in found if name in along}


def tensors_of(module: nn.Module, path: str = "") -> Iterator[str]:
    """Names of the parameters of a module, those among them that are computed now (see `seen`) under their own."""
    for name, value in module._parameters.items():
        if value is not None:
            yield path + name
    for name, child in module.named_children():
        if name.startswith(SEEN):
            yield path + name.removeprefix(SEEN)
        else:
            yield from tensors_of(child, f"{path}{name}.")


def space(site: Site, side: Side) -> str:
    """The space that a sub-layer at this site reads or writes."""
    cross = "cross_" if site.name.startswith("cross_") else ""
    name = (READS if side == "read" else WRITES).get(site.name.removeprefix("cross_"))
    return cross + name if name else RESIDUAL


def part(sites: list[Site], tensor: str, owner: nn.Module, name: str, axes: tuple[Axis, ...]) -> Part:
    layer = sites[0].layer
    assert layer is not None
    own = None if isinstance(owner, nn.Linear) and tensor in ("A", "B") else sites[0]
    return Part(layer, frozenset(site.name for site in sites), tensor, owner, name, axes, sites[0].host, own)


def head_parts(base: Any, name: str) -> Iterator[Part]:
    """What is trained whole, such as a classification head: it reads the residual stream."""
    d = base.config.get_text_config().hidden_size
    for path, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            for tensor in tensors_of(module.modules_to_save[name]):
                owner, _, attribute = tensor.rpartition(".")
                whole = module.modules_to_save[name].get_submodule(owner)
                axes = tuple(
                    Axis(dim, "read" if dim else "write", {RESIDUAL: None})
                    for dim, size in enumerate(getattr(whole, attribute).shape)
                    if size == d
                )
                yield Part(HEAD, frozenset([path]), tensor, whole, attribute, axes, path)
