"""UniPELT: adapter, prefix and LoRA in every layer, each with its own gate."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

from hf_peft_ext.attach.config import PrefixedConfig
from hf_peft_ext.attach.placement import LEAF_SITES, GatePooling, Placement
from hf_peft_ext.validation.checks import check, check_count, check_dropout, check_names, check_positive

METHODS = ("adapter", "prefix", "lora", "bitfit")


@dataclass
class UniPELTConfig(PrefixedConfig):
    """A Pfeiffer adapter, in-attention prefixes and LoRA, each scaled by a gate on its own input.

    Mao et al. 2022 (https://arxiv.org/abs/2110.07577), Eq. 4 to 7, with the defaults of its code: prefix length 10,
    bottleneck 48, LoRA of rank 8 and alpha 16. Where we differ:

    - in the code LoRA's gate replaces alpha / r; here it multiplies it (`lora_alpha=r` gives the code's);
    - the mean of the gates excludes padding, and where attention is causal each token has its own gate
      (`gate_pooling`);
    - the prefixes are plain by default (`prefix_projection=True` for the code's network, 512 wide).

    Args:
        methods: which sub-layers: "adapter", "prefix", "lora", "bitfit". The paper's AP, APL and APLB are these, in
            order.
        gated: False for the paper's ablation without gates.
        gate_pooling: "mean" over the tokens of an example (the paper), "mean_padded" (over its padding too, as in the
            paper's code), "token", or "auto": token where attention is causal, else mean.
        bottleneck_size: width of the adapter.
        r: rank of LoRA.
        lora_alpha: numerator of LoRA's scaling.
        lora_dropout: dropout before LoRA.
        lora_targets: where LoRA sits: query and value as in the code, ("query", "key") as the paper's text has it.

    Raises:
        ValueError: a value breaks a rule, or `methods` is empty.
    """

    method = "unipelt"

    methods: Sequence[str] = field(default=("adapter", "prefix", "lora"), metadata={"help": "Which sub-layers."})
    gated: bool = field(default=True, metadata={"help": "Whether gates scale the sub-layers."})
    gate_pooling: GatePooling = field(default="auto", metadata={"help": "Gates over tokens: mean, token..."})
    bottleneck_size: int = field(default=48, metadata={"help": "Width of the adapter."})
    r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = field(default=16, metadata={"help": "Numerator of LoRA's scaling."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA."})
    lora_targets: Sequence[str] = field(default=("query", "value"), metadata={"help": "Where LoRA sits."})

    def __post_init__(self) -> None:
        self.methods = check_names("methods", self.methods, METHODS)
        self.lora_targets = check_names("lora_targets", self.lora_targets, LEAF_SITES)
        check_count("bottleneck_size", self.bottleneck_size)
        check_count("r", self.r)
        check_positive("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        gates = not self.gated or self.methods != ["bitfit"]
        check("gated", self.gated, gates, "needs a sub-layer that can be gated; a bias reads no input")
        poolings = get_args(GatePooling)
        check(
            "gate_pooling", self.gate_pooling, self.gate_pooling in poolings, f"must be one of {', '.join(poolings)}"
        )
        super().__post_init__()

    def to_placements(self) -> list[Placement]:
        gate = self.gate_pooling if self.gated else None
        lora = {"r": self.r, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
        sublayers = {
            "adapter": [Placement("bottleneck", "after_residual", gate=gate, options={"r": self.bottleneck_size})],
            "prefix": [self.prefix(gate)],
            "lora": [Placement("low_rank", site, gate=gate, options=lora) for site in self.lora_targets],
            "bitfit": [Placement("bias", "bias")],
        }
        return [placement for name in self.methods for placement in sublayers[name]]
