"""BitFit: only biases are trained."""

from dataclasses import dataclass

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.placement import Placement


@dataclass
class BitFitConfig(PlacedConfig):
    """Train the biases of linear leaves and norms below the head (`sublayers.Bias`).

    Ben Zaken et al. 2022 (https://arxiv.org/abs/2106.10199). Where a model has none (T5, Llama), each linear leaf of
    its blocks is given one, zero at the start. The adapter holds the differences from the base model's biases.

    Raises:
        ValueError: a value breaks a rule.
    """

    method = "bitfit"

    def to_placements(self) -> list[Placement]:
        return [Placement("bias", "bias")]
