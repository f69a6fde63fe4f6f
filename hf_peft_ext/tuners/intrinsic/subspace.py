"""The trained vector of an adapter, shared by the projections of all its parameters."""

import torch
from torch import Tensor, nn

from hf_peft_ext.tuners.intrinsic.projections import Shuffle


class Subspace(nn.Module):
    """d numbers: theta_d, and behind it the scales of SAID, as differences from one. All are zero at the start.

    Args:
        d: how many numbers there are.
        n_scales: how many of them are scales.
        shuffle: the part of the projection that is the same for all parameters; None for none.
    """

    def __init__(self, d: int, n_scales: int, shuffle: Shuffle | None):
        super().__init__()
        self.n_scales = n_scales
        self.vector = nn.Parameter(torch.zeros(d, dtype=torch.float32))
        self.shuffle = shuffle

    def coordinates(self) -> Tensor:  # shape: (n,)
        """theta_d in single or double precision, shuffled."""
        vector = self.vector.to(torch.promote_types(self.vector.dtype, torch.float32))
        theta = vector[: len(vector) - self.n_scales]
        return theta if self.shuffle is None else self.shuffle(theta)

    def scale(self, index: int) -> Tensor | float:
        """lambda of a layer or tensor; 1 where there are no scales."""
        return 1 + self.vector[index - self.n_scales] if self.n_scales else 1.0
