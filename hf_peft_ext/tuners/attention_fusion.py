"""Attention fusion: the outputs of several frozen adapters, weighed by trained attention."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

from hf_peft_ext.attach.fusion import FusionConfig
from hf_peft_ext.attach.layer import TunerLayer
from hf_peft_ext.sublayers import AdapterFusion, AttentionFusion
from hf_peft_ext.validation.checks import check, check_positive

FusionStyle = Literal["light", "pfeiffer"]


@dataclass
class AttentionFusionConfig(FusionConfig):
    """Weigh the outputs of adapters of one model, at each place and for each token.

    The adapters consist of bottlenecks (also of Compacter and AdaMix) or LoRA branches, and stay frozen.

    Args:
        style: "light", the gate of Cao et al. 2022 (https://aclanthology.org/2022.findings-naacl.64): d numbers at
            each place (`sublayers.AttentionFusion`); or "pfeiffer", the AdapterFusion of Pfeiffer et al. 2021
            (https://arxiv.org/abs/2005.00247): query, key and value, 3 d^2 numbers (`sublayers.AdapterFusion`).
        weights: of the adapters in an untrained "light" fusion, one for each; None for equal ones, the mean of the
            outputs.
        value: whether "pfeiffer" has a value matrix.

    Raises:
        ValueError: a value breaks a rule.

    Example:
        >>> model.load_adapter("sst2", "a"), model.load_adapter("qnli", "b")  # doctest: +SKIP
        >>> model.add_adapter("both", AttentionFusionConfig(adapters=["a", "b"]))  # doctest: +SKIP
        >>> model.set_adapter("both")  # doctest: +SKIP
    """

    method = "attention_fusion"

    style: FusionStyle = field(default="light", metadata={"help": "light or pfeiffer."})
    weights: list[float] | None = field(default=None, metadata={"help": "Of the adapters before training."})
    value: bool = field(default=True, metadata={"help": "Whether the style pfeiffer has a value matrix."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check("style", self.style, self.style in get_args(FusionStyle), "must be light or pfeiffer")
        check("value", self.value, isinstance(self.value, bool), "must be True or False")
        check("value", self.value, self.value or self.style == "pfeiffer", "must be True where `style` is light")
        if self.weights is not None:
            self.weights = list(self.weights)
            check("weights", self.weights, self.style == "light", "must be None where `style` is pfeiffer")
            check("weights", self.weights, len(self.weights) == len(self.adapters), "must have one for each adapter")
            for weight in self.weights:
                check_positive("weights", weight)

    def sublayer(self, layer: TunerLayer, names: list[str]) -> nn.Module:
        """The attention over the adapters at one place."""
        d = layer.site.width or layer.site.d_out
        if self.style == "pfeiffer":
            return AdapterFusion(layer.site.d_in, d, names, layer.sublayer_of, self.value)
        weight_of = dict(zip(self.adapters, self.weights or [], strict=False))
        own = [weight_of[name] for name in names if weight_of]
        return AttentionFusion(d, names, layer.sublayer_of, [weight / sum(own) for weight in own] or None)
