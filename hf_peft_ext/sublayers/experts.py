"""AdaMix's bottleneck: several experts, one drawn at random in training, their average else."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_peft_ext.sublayers.bottleneck import Bottleneck

ExpertSharing = Literal["none", "down", "up"]


class ExpertLinear(nn.Module):
    """W_e x + b_e,  W: (experts, d_out, d_in), b: (experts, d_out), zero at the start.

    The experts of a matrix are one parameter. So every expert has a gradient, zero if it was not drawn, and data
    parallelism meets no unused parameters.

    Args:
        num_experts: number of experts.
        d_in: width of x.
        d_out: width of the output.
    """

    def __init__(self, num_experts: int, d_in: int, d_out: int):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_experts, d_out, d_in))
        self.biases = nn.Parameter(torch.zeros(num_experts, d_out))

    def one(self) -> tuple[Tensor, Tensor]:  # shapes: (d_out, d_in), (d_out,)
        """In training the matrix and bias of an expert that is drawn anew at each call, else the averages."""
        if not self.training:
            return self.weights.mean(0), self.biases.mean(0)
        # from the device's generator, which gradient checkpointing restores before it computes a block anew
        drawn = torch.randint(len(self.weights), (1,), device=self.weights.device)
        return self.weights.index_select(0, drawn).squeeze(0), self.biases.index_select(0, drawn).squeeze(0)


class MixtureBottleneck(Bottleneck):
    """A bottleneck with several experts for W_down, b_down and for W_up, b_up.

    AdaMix, Wang et al. 2022 (https://arxiv.org/abs/2205.12410). In training each call draws one expert of each, both
    independently; else it has the averages of the experts, the paper's merging.

    Args:
        d: width of x and of the output.
        r: width of the bottleneck.
        num_experts: number of experts.
        shared_projection: the projection that has one expert only, "none", "down" or "up".
        init: "lora": each W_down Kaiming uniform and each W_up zero, so that f = 0 at the start; or the standard
            deviation of all.
        options: the other arguments of `Bottleneck`.
    """

    def __init__(
        self,
        d: int,
        r: int = 16,
        num_experts: int = 4,
        shared_projection: ExpertSharing = "none",
        init: float | Literal["lora"] = "lora",
        **options: Any,
    ):
        super().__init__(d, r, **options)
        downs, ups = (1 if side == shared_projection else num_experts for side in ("down", "up"))
        self.down, self.up = ExpertLinear(downs, d, r), ExpertLinear(ups, r, d)
        for weight in self.down.weights.data:
            if init == "lora":
                nn.init.kaiming_uniform_(weight, a=5**0.5)
            else:
                nn.init.normal_(weight, std=init)
        nn.init.normal_(self.up.weights, std=0.0 if init == "lora" else init)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_down, b_down, W_up and b_up: of drawn experts in training, else the averages."""
        return *self.down.one(), *self.up.one()

    def to_plain(self) -> Bottleneck:
        """The plain bottleneck with the averages of the experts, on the same device and in the same type."""
        weights, scaling = self.down.weights, self.scaling
        plain = Bottleneck(weights.shape[2], weights.shape[1], dropout=self.dropout.p, gate=self.gate)
        plain.activation, plain.scaling = self.activation, scaling
        plain = plain.to(weights.device, weights.dtype)
        with torch.no_grad():
            for linear, experts in ((plain.down, self.down), (plain.up, self.up)):
                linear.weight.copy_(experts.weights.mean(0))
                linear.bias.copy_(experts.biases.mean(0))
        return plain.requires_grad_(weights.requires_grad).train(self.training)
