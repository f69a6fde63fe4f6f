"""UniPELT: adapter, prefix and LoRA in every layer, each with its own gate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from hf_peft_ext.attach.config import PrefixedConfig
from hf_peft_ext.attach.placement import LEAF_SITES, GatePooling, Placement
from hf_peft_ext.validation.checks import check, check_count, check_dropout, check_names, check_positive, is_number

GATE_INITS = {"base": 2.0, "paper": 0.0}
METHODS = ("adapter", "prefix", "lora", "bitfit")


@dataclass
class UniPELTConfig(PrefixedConfig):
    """A Pfeiffer adapter, in-attention prefixes and LoRA, each scaled by a gate on its own input.

    Mao et al. 2022 (https://arxiv.org/abs/2110.07577), Eq. 4 to 7, with the defaults of its code: prefix length 10,
    bottleneck 48, LoRA of rank 8 and alpha 16. Where we differ:

    - in the code LoRA's gate replaces alpha / r; here it multiplies it (`lora_alpha=r` gives the code's);
    - the mean of the gates excludes padding, and where attention is causal each token has its own gate
      (`gate_pooling`);
    - the prefixes are plain by default (`prefix_projection=True` for the code's network, 512 wide);
    - the untrained adapter is the base model: the adapter's up-projection starts at zero, and the prefix has a softmax
      of its own. The gates start open, since there is nothing to keep out (`gate_init`). `init="paper"` has the
      paper's adapter, prefix, and gates at 0.5.

    Args:
        methods: which sub-layers: "adapter", "prefix", "lora", "bitfit". The paper's AP, APL and APLB are these, in
            order.
        gated: False for the paper's ablation without gates.
        gate_pooling: "mean" over the tokens of an example (the paper), "mean_padded" (over its padding too, as in the
            paper's code), "token", or "auto": token where attention is causal, else mean.
        gate_init: bias of the gates before training, which opens them to about sigmoid(gate_init): a number, or one
            for each of "adapter", "prefix" and "lora"; None for 2 (0.88), or for 0 with `init="paper"`.
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
    gate_init: float | dict[str, float] | None = field(
        default=None, metadata={"help": "Bias of the gates before training, for all or for each sub-layer."}
    )
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
        self._check_gate_init()
        super().__post_init__()

    def _check_gate_init(self) -> None:
        check("gate_init", self.gate_init, self.gated or self.gate_init is None, "must be None without gates")
        inits = self.gate_init if isinstance(self.gate_init, Mapping) else {}
        gated = [name for name in self.methods if name != "bitfit"]
        check("gate_init", self.gate_init, inits.keys() <= {*gated}, f"must have the keys {', '.join(gated)} only")
        values = inits.values() if inits else [self.gate_init or 0.0]
        check("gate_init", self.gate_init, all(map(is_number, values)), "must be a number, or one for each sub-layer")

    def gate(self, name: str) -> dict[str, Any]:
        """The gate of a sub-layer, as fields of its placement; empty without gates."""
        if not self.gated:
            return {}
        default, init = GATE_INITS[self.init], self.gate_init
        init = init.get(name, default) if isinstance(init, Mapping) else default if init is None else init
        return {"gate": self.gate_pooling, "gate_init": init}

    def to_placements(self) -> list[Placement]:
        lora = {"r": self.r, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
        adapter = {"r": self.bottleneck_size} | ({"init": 0.02} if self.init == "paper" else {})
        sublayers = {
            "adapter": [Placement("bottleneck", "after_residual", options=adapter, **self.gate("adapter"))],
            "prefix": [self.prefix(**self.gate("prefix"))],
            "lora": [Placement("low_rank", site, options=lora, **self.gate("lora")) for site in self.lora_targets],
            "bitfit": [Placement("bias", "bias")],
        }
        return [placement for name in self.methods for placement in sublayers[name]]
