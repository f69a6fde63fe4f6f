"""Adapters that combine other adapters of the same model, place by place."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.layer import SharedLayer, TunerLayer
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.registry import extend_on_first_use
from hf_peft_ext.sublayers import Additive
from hf_peft_ext.validation.checks import check

# host path -> the tuner layers there with adapters to combine, and the names of these
FusedLayers = dict[str, list[tuple[TunerLayer, list[str]]]]


@dataclass
class FusionConfig(PlacedConfig):
    """Base of the configs of adapters that combine others: a sub-layer at each place where those have one.

    Args:
        adapters: names of the adapters, which the model must have already.

    Raises:
        ValueError: a field is unknown, or its value breaks a rule.
    """

    adapters: list[str] = field(default_factory=list, metadata={"help": "Names of the adapters to combine."})

    def __post_init__(self) -> None:
        rule = "must be a list of different names"
        check("adapters", self.adapters, not isinstance(self.adapters, str), rule)
        self.adapters = list(self.adapters)
        check("adapters", self.adapters, len({*self.adapters}) == len(self.adapters), rule)
        check("sites", self.sites, not self.sites, "must be None: an adapter that combines others sits where they sit")
        super().__post_init__()

    def to_placements(self) -> list[Placement]:
        """None: the places are those of the other adapters."""
        return []

    @abstractmethod
    def sublayer(self, layer: TunerLayer, names: list[str]) -> nn.Module:
        """The sub-layer that combines the adapters `names` at one place."""


def fused_layers(model: nn.Module, config: FusionConfig) -> FusedLayers:
    """The tuner layers of the adapters that a config combines.

    Raises:
        ValueError: there are fewer than two adapters, the model lacks one, or one has a sub-layer whose output cannot
            be combined.
    """
    check("adapters", config.adapters, len(config.adapters) > 1, "must hold two names or more")
    fused, present = FusedLayers(), set[str]()
    chosen: Any = config.layers_to_transform
    for layer in model.modules():
        if not isinstance(layer, TunerLayer) or isinstance(layer, SharedLayer):
            continue
        names = [name for name in config.adapters if name in layer.sublayer_of]
        present |= {*names}
        if not names or (chosen is not None and layer.site.layer not in chosen):
            continue
        for name in names:
            kind = type(layer.sublayer_of[name]).__name__
            rule = f"cannot be combined: {name!r} has a {kind} at {layer.site.host}; bottlenecks and LoRA can"
            check("adapters", config.adapters, isinstance(layer.sublayer_of[name], Additive), rule)
        fused.setdefault(layer.site.host, []).append((layer, names))
    missing = sorted({*config.adapters} - present)
    check("adapters", missing, not missing, "must be adapters that the model has already; load them first")
    check("layers_to_transform", chosen, bool(fused), "holds no layer with these adapters")
    return fused


@extend_on_first_use
def add_adapter(
    stock: Callable[..., None], model: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any
) -> None:
    """As `PeftModel.add_adapter`. All methods made of placements have one tuner, so one model may have several."""
    own = model.peft_type
    if all(isinstance(config, PlacedConfig) for config in (peft_config, *model.peft_config.values())):
        model.peft_type = peft_config.peft_type  # peft refuses others
    try:
        stock(adapter_name, peft_config, *args, **kwargs)
    finally:
        model.peft_type = own
