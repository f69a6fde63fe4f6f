"""Differences of parameters: sparse ones, and the dense ones that the first phase of two methods trains."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_peft_ext.tuners.sparse.config import SparseConfig
from hf_peft_ext.tuners.sparse.targets import SparseTarget

# The stretched interval (l, r) of the hard-concrete distribution, and log alpha at the start: the paper's code.
LOW, HIGH, START = -1.5, 1.5, 5.0


class SparseDelta(nn.Module):
    """delta: k values at k indices of all targets, zero elsewhere.

    Args:
        k: number of values.
        targets: the targets.
    """

    indices: Tensor  # shape: (k,), increasing; -1 before they are selected

    def __init__(self, k: int, targets: Sequence[SparseTarget]):
        super().__init__()
        self.borders = [0, *(target.stop for target in targets)]
        self.values = nn.Parameter(torch.zeros(k))
        dtype = torch.int32 if self.size <= torch.iinfo(torch.int32).max else torch.int64
        self.register_buffer("indices", torch.full((k,), -1, dtype=dtype))
        self.search: DenseDelta | None = None
        self._places: tuple[Tensor, int, list[int]] | None = None

    @property
    def size(self) -> int:
        """Number of entries of all targets."""
        return self.borders[-1]

    @property
    def is_selected(self) -> bool:
        """Whether the indices are set."""
        return not self.indices.is_meta and self.places()[0] == 0

    @torch.no_grad()
    def select(self, indices: Tensor, values: Tensor | None = None) -> None:
        """Set the indices, in any order, and the values; zero by default."""
        order = indices.argsort()
        self.indices.copy_(indices[order])
        self.values.copy_(torch.zeros_like(self.values) if values is None else values[order])

    def segment(self, i: int) -> tuple[Tensor, Tensor]:
        """The values of the i-th target, and their indices in the flattened parameter."""
        a, b = self.places()[i : i + 2]
        return self.values[a:b], self.indices[a:b].long() - self.borders[i]

    def places(self) -> list[int]:
        """The place of each target's first value, and k; computed again when the indices change."""
        indices, cached = self.indices, self._places
        if cached is None or cached[0] is not indices or cached[1] != indices._version:
            borders = torch.tensor(self.borders, device=indices.device)
            places = torch.searchsorted(indices.long(), borders).tolist()
            self._places = cached = (indices, indices._version, places)
        return cached[2]


class DenseDelta(nn.Module):
    """delta = w, or z * w with hard-concrete gates; w is zero at the start, for every entry of all targets.

        z = min(1, max(0, s (r - l) + l)),  s = sigmoid(log u - log(1 - u) + log alpha),  u uniform in (0, 1)

    Louizos et al. 2018 (https://arxiv.org/abs/1712.01312), Eq. 10 to 12; u = 1/2 outside training. For diff pruning,
    Guo et al. 2021 (https://arxiv.org/abs/2012.07463), Eq. 4, with the interval of its code.

    Args:
        targets: the targets.
        gated: whether there are gates.
        device: of the tensors.
    """

    def __init__(self, targets: Sequence[SparseTarget], gated: bool, device: torch.device):
        super().__init__()
        self.w = nn.ParameterList(torch.zeros(t.shape, device=device) for t in targets)
        gates = targets if gated else ()
        self.log_alpha = nn.ParameterList(torch.full(t.shape, START, device=device) for t in gates)

    def forward(self, i: int) -> Tensor:
        """The difference of the i-th target."""
        return self.gate(i) * self.w[i] if len(self.log_alpha) else self.w[i]

    def gate(self, i: int) -> Tensor:
        """z of the i-th target."""
        logits = self.log_alpha[i]
        if self.training:
            u = torch.rand_like(logits).clamp(1e-4, 1 - 1e-4)
            logits = logits + u.logit()
        return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def penalty(self, config: SparseConfig) -> Tensor:
        """The term of the loss: l0 times the expected number of open gates, or l1 times the mean |w|."""
        if len(self.log_alpha):
            shift = math.log(-LOW / HIGH)
            return config.l0 * torch.stack([F.sigmoid(a - shift).sum() for a in self.log_alpha]).sum()
        size = sum(w.numel() for w in self.w)
        return config.l1 * torch.stack([w.abs().sum() for w in self.w]).sum() / size

    @torch.no_grad()
    def flat(self) -> Tensor:
        """The differences of all targets, with the gates' means, shape: (size,)."""
        training = self.training
        deltas = [self.eval()(i).flatten() for i in range(len(self.w))]
        self.train(training)
        return torch.cat(deltas)
