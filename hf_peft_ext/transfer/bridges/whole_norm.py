"""Norms of the pruned copy in a delta bridge, over all channels of the large model."""

from typing import Any

import torch
from torch import Tensor, nn


class WholeNorm:
    """A norm over all channels of the large model's residual stream; the pruned copy has and changes some of them.

    With c = x - mu over the kept channels, and R_1, R_2 the sums of c and c^2 over the others in the large model:
    y = gain (c - m) / sqrt((sum c^2 + R_2) / d - m^2 + eps) + bias, m = (sum c + R_1) / d. An RMS norm has mu = m = 0.

    It replaces `forward`, since a Pfeiffer adapter calls the norm's forward a second time, without hooks. The n-th
    call uses the statistics recorded by the large model's n-th call, or its last.

    Args:
        large, copy: the norm in the large model and in the copy.
        kept: the channels that the copy has.
    """

    def __init__(self, large: Any, copy: Any, kept: Tensor):
        self.large, self.copy, self.d, self.kept, self.eps = large, copy, len(large.weight), kept, eps_of(large)
        self.centred = isinstance(large, nn.LayerNorm)
        self.statistics: list[tuple[Tensor, Tensor, Tensor]] = []
        self.calls = 0
        if self.centred:
            self.gain, self.bias = copy.weight, copy.bias
        else:  # some add one to their weight; their output for ones is the gain
            with torch.no_grad():
                self.gain, self.bias = copy(torch.ones_like(copy.weight)) * (1 + self.eps) ** 0.5, None
        self.large_forward = large.forward
        large.forward, copy.forward = self.measure, self.divide

    def remove(self) -> None:
        """Give both norms their own forward again."""
        del self.large.forward, self.copy.forward

    def measure(self, x: Tensor) -> Tensor:
        """The large norm; mu, R_1 and R_2 of each token are recorded, shapes: (*batch, 1)."""
        wide = x.float()
        mu = wide.mean(-1, keepdim=True) if self.centred else wide.new_zeros(*x.shape[:-1], 1)
        c = wide - mu
        kept = c[..., self.kept.to(x.device)]
        r_2 = c.square().sum(-1, keepdim=True) - kept.square().sum(-1, keepdim=True)
        self.statistics.append((mu, c.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True), r_2))
        return self.large_forward(x)

    def divide(self, x: Tensor) -> Tensor:
        """The copy's norm, by the statistics of all channels."""
        mu, r_1, r_2 = self.statistics[min(self.calls, len(self.statistics) - 1)]
        self.calls += 1
        c = x.float() - mu
        m = (c.sum(-1, keepdim=True) + r_1) / self.d if self.centred else 0.0
        mean_square = (c.square().sum(-1, keepdim=True) + r_2) / self.d
        y = self.gain * ((c - m) * (mean_square - m * m + self.eps).rsqrt())
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def eps_of(norm: Any) -> float:
    """The epsilon of a norm; its name depends on the class."""
    return next(getattr(norm, name) for name in ("eps", "variance_epsilon", "layer_norm_eps") if hasattr(norm, name))
