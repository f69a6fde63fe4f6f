"""Random projections P from d numbers to the D adapted parameters, one module for each parameter tensor.

The columns of P are orthogonal and of length sqrt(D / d), in expectation, where the papers' have length 1. So an
update of theta_d changes each parameter by as much as each of the d numbers, on average. A learning rate then suits
all d, and is comparable with that of full fine-tuning.

The random numbers are drawn once from a seed and kept as buffers that are never saved. Drawing them again in each
forward would take longer than the transform, on a GPU above all, since only the CPU's generator gives the same numbers
on all devices. Gaussians are kept as the bits of half-precision numbers: 2 bytes for each adapted parameter, which
`model.to(dtype)` does not round.
"""

import hashlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 32  # rows of the largest Hadamard matrix that is multiplied as a matrix

ProjectionKind = Literal["fastfood", "dense", "sparse"]


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for one tensor: equal for equal seeds and names, in every process."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def normal_bits(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in half precision, as int16; without data if there is no generator."""
    if generator is None:
        return torch.empty(shape, dtype=torch.int16, device="meta")
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).half().view(torch.int16)


def random_integers(high: int, size: int, generator: torch.Generator | None) -> Tensor:
    """Integers in [0, high), shape (size,); without data if there is no generator."""
    if generator is None:
        return torch.empty(size, dtype=torch.int64, device="meta")
    return torch.randint(high, (size,), generator=generator, device="cpu")


def random_signs(size: int, generator: torch.Generator | None) -> Tensor:
    """-1 and 1 as int8, shape (size,)."""
    return (2 * random_integers(2, size, generator) - 1).to(torch.int8)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


class Hadamard(nn.Module):
    """H x for the Walsh-Hadamard matrix H of -1 and 1, whose size is a power of two.

    H of size m n is the Kronecker product of those of sizes m and n. So the transform takes a few products with
    matrices of at most 32 rows, O(n log n) in all. They run faster than one pass over memory for each level.
    """

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        matrix = torch.ones(1, 1, dtype=torch.int8)
        while len(matrix) < LARGEST:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(
        self,
        x: Tensor,  # shape: (*batch, n)
    ) -> Tensor:  # shape: (*batch, n)
        """H x, along the last axis."""
        shape, inner = x.shape, 1
        while (left := shape[-1] // inner) > 1:
            size = min(left, LARGEST)
            h = self.matrix[:size, :size].to(x.dtype)
            x = x.reshape(-1, size) @ h if inner == 1 else h @ x.reshape(-1, size, inner)
            inner *= size
        return x.reshape(shape)


class Shuffle(nn.Module):
    """Pi H B theta: signs B, orthonormal H, permutation Pi. A rotation, the first half of Fastfood.

    Args:
        d: length of theta. It is padded with zeros to a power of two, n.
        generator: draws B and Pi; None for a model without data.
    """

    signs: Tensor  # (n,)
    permutation: Tensor  # (n,)

    def __init__(self, d: int, generator: torch.Generator | None):
        super().__init__()
        n = power_of_two(d)
        order = random_integers(1, n, None) if generator is None else torch.randperm(n, generator=generator)
        self.register_buffer("signs", random_signs(n, generator), persistent=False)
        self.register_buffer("permutation", order, persistent=False)
        self.hadamard = Hadamard()

    def forward(
        self,
        theta: Tensor,  # shape: (d,)
    ) -> Tensor:  # shape: (n,)
        """The rotated vector."""
        n = len(self.signs)
        x = F.pad(theta, (0, n - len(theta))) * self.signs * n**-0.5
        return self.hadamard(x).index_select(0, self.permutation)


class Fastfood(nn.Module):
    """P_i theta = H G Pi H B theta / sqrt(d), the rows of the Fastfood matrix for one parameter tensor.

    Le et al. 2013 (https://arxiv.org/abs/1408.3060), with which Li et al. 2018 and Aghajanyan et al. 2021 project. The
    left H has entries of -1 and 1, the right one is orthonormal, and G is diagonal with standard normal entries.

    - The rows come in blocks of n, the power of two at or above d, each with a G of its own. So the transform takes
      O(D log d), where a transform of the padded tensor would take O(D log D).
    - B and Pi are the same for all blocks, so that Pi H B theta (`Shuffle`) is the input here. Each row of P is a
      Gaussian vector all the same, since a rotation leaves its distribution unchanged.
    - A tensor with fewer than n entries gets the first rows of its block, which are those of a smaller H, repeated.
      (Known implementations crop theta there, so that small tensors see its first coordinates only.)

    Args:
        size: number of entries of the tensor.
        d: length of theta.
        total: D, the number of all adapted parameters; not used.
        generator: draws G; None for a model without data.
    """

    gaussian: Tensor  # G, as bits, (blocks, n)

    def __init__(self, size: int, d: int, total: int, generator: torch.Generator | None):
        super().__init__()
        n = power_of_two(d)
        self.size, self.scaling = size, d**-0.5
        self.register_buffer("gaussian", normal_bits((-(-size // n), n), generator), persistent=False)
        self.hadamard = Hadamard()

    def forward(
        self,
        x: Tensor,  # shape: (n,)
    ) -> Tensor:  # shape: (size,)
        """P_i theta, for x = Pi H B theta."""
        z = x * self.scaling * self.gaussian.view(torch.float16)  # (blocks, n)
        rows = min(z.shape[-1], power_of_two(self.size))
        if rows < z.shape[-1]:
            z = z.view(-1, rows).sum(0)  # (rows,)
        return self.hadamard(z).flatten()[: self.size]


class DenseNormal(nn.Module):
    """P_i theta for normal entries with variance 1 / d: 2 bytes for each, size x d of them.

    Li et al. 2018 (https://arxiv.org/abs/1804.08838). For small models.

    Args:
        size, d, total, generator: as in `Fastfood`.
    """

    gaussian: Tensor  # as bits, (size, d)

    def __init__(self, size: int, d: int, total: int, generator: torch.Generator | None):
        super().__init__()
        self.scaling = d**-0.5
        self.register_buffer("gaussian", normal_bits((size, d), generator), persistent=False)

    def forward(
        self,
        theta: Tensor,  # shape: (d,)
    ) -> Tensor:  # shape: (size,)
        """P_i theta."""
        return self.gaussian.view(torch.float16).to(theta.dtype) @ (theta * self.scaling)


class SparseSigns(nn.Module):
    """P_i theta for entries that are zero but for a share 1 / s, s = sqrt(D); those are +-sqrt(s / d).

    Very sparse random projections, Li, Hastie and Church 2006, as in Li et al. 2018. The entries are drawn with
    replacement; equal places add up.

    Args:
        size, d, total, generator: as in `Fastfood`.
    """

    rows: Tensor  # (entries,)
    columns: Tensor  # (entries,)
    signs: Tensor  # (entries,)

    def __init__(self, size: int, d: int, total: int, generator: torch.Generator | None):
        super().__init__()
        sparsity = total**0.5
        self.size, self.scaling = size, (sparsity / d) ** 0.5
        count = round(size * d / sparsity)
        if generator is not None:
            share = torch.tensor(1 / sparsity, dtype=torch.float64)
            entries = torch.tensor(float(size * d), dtype=torch.float64)
            count = int(torch.binomial(entries, share, generator=generator))
        self.register_buffer("rows", random_integers(size, count, generator), persistent=False)
        self.register_buffer("columns", random_integers(d, count, generator), persistent=False)
        self.register_buffer("signs", random_signs(count, generator), persistent=False)

    def forward(
        self,
        theta: Tensor,  # shape: (d,)
    ) -> Tensor:  # shape: (size,)
        """P_i theta."""
        values = theta.index_select(0, self.columns) * self.signs * self.scaling  # (entries,)
        return values.new_zeros(self.size).index_add(0, self.rows, values)


PROJECTIONS: dict[ProjectionKind, type[Fastfood] | type[DenseNormal] | type[SparseSigns]] = {
    "fastfood": Fastfood,
    "dense": DenseNormal,
    "sparse": SparseSigns,
}
