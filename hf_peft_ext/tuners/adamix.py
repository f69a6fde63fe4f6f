"""AdaMix: several bottlenecks at each place, one of them drawn for each batch, their average for inference."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from hf_peft_ext.attach.config import ComposedConfig, PlacedConfig
from hf_peft_ext.attach.placement import EXPERT_OPTIONS, Placement
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.sublayers import ExpertSharing, MixtureBottleneck
from hf_peft_ext.validation.checks import check


@dataclass
class AdaMixConfig(PlacedConfig):
    """Mixtures of bottleneck adapters after the FFN, before its residual (`sublayers.MixtureBottleneck`).

    Wang et al. 2022 (https://arxiv.org/abs/2205.12410), with the settings of its scripts for MNLI: 4 experts, 16
    wide, GELU, W_up shared. In training each layer draws W_down, and W_up if it is not shared, anew for each forward
    pass. For inference it has the averages of the experts. `trainers.AdaMixTrainer` adds the paper's consistency
    loss, and `merge_experts` leaves one plain bottleneck at each place. Where we differ: the untrained adapter is the
    base model, since W_up starts at zero, and the experts start from different W_down.

    The draws come from torch's generator, so a seed repeats them. Processes with different seeds draw differently.

    Args:
        r: width of each bottleneck.
        num_experts: number of experts.
        shared_projection: "up", "down" or "none", the projection with one expert only.
        activation: a name in transformers' `ACT2FN`.
        dropout: probability, inside the bottleneck.

    Raises:
        ValueError: a value breaks a rule.
    """

    method = "adamix"

    r: int = field(default=16, metadata={"help": "Width of each bottleneck."})
    num_experts: int = field(default=4, metadata={"help": "Number of experts."})
    shared_projection: ExpertSharing = field(default="up", metadata={"help": "Projection with one expert."})
    activation: str = field(default="gelu", metadata={"help": "Activation."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout inside the bottleneck."})

    def to_placements(self) -> list[Placement]:
        names = ("r", "num_experts", "shared_projection", "activation", "dropout")
        return [Placement("bottleneck", "after_ffn", options={name: getattr(self, name) for name in names})]


def merge_experts(model: nn.Module, adapter_name: str = "default") -> int:
    """Replace the experts of an adapter by their average, a plain bottleneck at each place, in place.

    The outputs in inference stay the same. The adapter is a `ComposedConfig` afterwards, so that its file holds one
    bottleneck at each place.

    Args:
        model: a model with adapters, a `PeftModel` or not.
        adapter_name: the adapter.

    Returns:
        The number of mixtures that were replaced.

    Raises:
        ValueError: the model has no such adapter.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    check("adapter_name", adapter_name, adapter_name in configs, f"must be one of {sorted(configs)}")
    replaced = 0
    for layer in tuner_layers(model):
        mixture = layer.sublayer_of[adapter_name] if adapter_name in layer.sublayer_of else None
        if isinstance(mixture, MixtureBottleneck):
            layer.sublayer_of[adapter_name] = mixture.to_plain()
            replaced += 1
    if replaced:
        config = configs[adapter_name]
        kept = {f.name: getattr(config, f.name) for f in fields(PlacedConfig) if f.init}
        configs[adapter_name] = ComposedConfig(**kept, placements=[one_bottleneck(p) for p in config.to_placements()])
    return replaced


def one_bottleneck(placement: Placement) -> Placement:
    """The placement without its options for experts."""
    options = {key: value for key, value in placement.options.items() if key not in EXPERT_OPTIONS}
    return replace(placement, options=options)
