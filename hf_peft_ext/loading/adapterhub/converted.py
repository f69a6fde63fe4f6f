"""A sub-layer at a site of the model, with its tensors from a checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from hf_peft_ext.attach.make_sublayer import SharedParts, build
from hf_peft_ext.attach.placement import GatePooling, Placement
from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.model.site import Site
from hf_peft_ext.validation.checks import check


@dataclass
class ConvertedSublayer:
    """A sub-layer at a site.

    Args:
        sublayer: "bottleneck", "low_rank", "prefix", "coupling", "prompt" or "intervention".
        site: where it is attached.
        gate: the pooling of its gate; None without one.
        options: of the placement.
        tensors: by their names in the sub-layer.

    Raises:
        ValueError: a tensor has another shape than the sub-layer at this site.
    """

    sublayer: str
    site: Site
    gate: GatePooling | None
    options: dict[str, Any]
    tensors: dict[str, Tensor]

    def placement(self) -> Placement:
        """The placement that this sub-layer belongs to."""
        return Placement(self.sublayer, self.site.name.removeprefix("cross_"), gate=self.gate, options=self.options)

    def __post_init__(self) -> None:
        with torch.device("meta"):
            sublayer = build(self.placement(), self.site, SharedParts())
        for name, expected in sublayer.state_dict().items():
            shape, rule = tuple(self.tensors[name].shape), f"must be {tuple(expected.shape)}, as at {self.site.host}"
            check(f"shape of {self.sublayer} {name}", shape, shape == expected.shape, rule)


def gate_pooling_of(method: Settings) -> GatePooling | None:
    """The pooling of the library's gates: a mean that includes padding."""
    return "mean_padded" if method.get("use_gating") else None


def activation_of(method: Settings) -> str:
    """The activation function, by its name in transformers.

    Raises:
        ValueError: transformers does not have it.
    """
    name = method["non_linearity"].lower().replace("leakyrelu", "leaky_relu")
    check("non_linearity", name, name in ACT2FN, "must be an activation of transformers")
    return name


def linear(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Tensor]:  # shapes: (d_out, d_in), (d_out,)
    """Take weight and bias of a linear layer."""
    return checkpoint.take(f"{name}.weight"), checkpoint.take(f"{name}.bias")


def linear_state(checkpoint: Checkpoint, name: str, part: str) -> dict[str, Tensor]:
    """Take a linear layer, by the names of its tensors in `part` of a sub-layer."""
    weight, bias = linear(checkpoint, name)
    return {f"{part}.weight": weight, f"{part}.bias": bias}
