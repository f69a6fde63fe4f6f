"""Training by forward passes alone, in the memory of inference: MeZO, and what it may train."""

from collections.abc import Callable, Iterable, Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_peft_ext.transfer.map.adapter_tensors import SEEN, Axis, parts_of
from hf_peft_ext.transfer.map.parametrize import Block, Computed, Step, parametrize
from hf_peft_ext.validation.checks import check, check_positive


class MeZO:
    """theta <- theta - lr (g z + lambda theta),  g = (L(theta + eps z) - L(theta - eps z)) / (2 eps),  z ~ N(0, I).

    Malladi et al. 2023 (https://arxiv.org/abs/2305.17333), Algorithm 1: g estimates the slope of the loss along z. The
    noise is never stored: it is drawn again from its seed, tensor by tensor. The paper takes theta back by
    subtracting, which leaves rounding errors; here a copy of what is trained is kept aside, so that a step which moves
    nothing changes no bit. (For an adapter that is nothing beside the model; the copy is as large as what is trained.)

    Args:
        parameters: what is trained, such as `trained(model)`.
        lr: the step.
        eps: how far the two losses stand from theta.
        samples: how many z a step averages over, two losses each.
        weight_decay: lambda.
        seed: of the noise.

    Raises:
        ValueError: a value breaks a rule, or there is no parameter.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-3,
        eps: float = 1e-3,
        samples: int = 1,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        self.parameters = list(parameters)
        check("parameters", len(self.parameters), bool(self.parameters), "must hold at least one that is trained")
        check_positive("eps", eps)
        check("samples", samples, type(samples) is int and samples > 0, "must be a positive whole number")
        self.lr, self.eps, self.samples, self.weight_decay = lr, eps, samples, weight_decay
        self.seeds = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor]) -> float:
        """One step.

        Args:
            loss: the loss at the parameters as they are, the same (batch, dropout) whenever it is called.

        Returns:
            The mean of the losses that were met.
        """
        start = [p.detach().clone() for p in self.parameters]
        slopes, met = [], []
        for seed in torch.randint(2**62, (self.samples,), generator=self.seeds).tolist():
            above, below = (self._loss_at(start, seed, sign * self.eps, loss) for sign in (1, -1))
            slopes.append((seed, (above - below) / (2 * self.eps)))
            met += [above, below]
        for p, value in zip(self.parameters, start, strict=True):
            p.copy_(value)
        for p in self.parameters:
            p.mul_(1 - self.lr * self.weight_decay)
        for seed, slope in slopes:
            for p, z in self._noise(seed):
                p.add_(z, alpha=-self.lr * slope / self.samples)
        return sum(met) / len(met)

    @torch.no_grad()
    def slope(self, loss: Callable[[], Tensor], seed: int) -> float:
        """g along the z of a seed. The parameters stay as they are."""
        start = [p.detach().clone() for p in self.parameters]
        above, below = (self._loss_at(start, seed, sign * self.eps, loss) for sign in (1, -1))
        for p, value in zip(self.parameters, start, strict=True):
            p.copy_(value)
        return (above - below) / (2 * self.eps)

    def _loss_at(self, start: list[Tensor], seed: int, distance: float, loss: Callable[[], Tensor]) -> float:
        for value, (p, z) in zip(start, self._noise(seed), strict=True):
            p.copy_(value).add_(z, alpha=distance)
        return float(loss())

    def _noise(self, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its part of z, one at a time."""
        generator = torch.Generator(self.parameters[0].device).manual_seed(seed)
        for p in self.parameters:
            yield p, torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


class Scale(nn.Module):
    """y = s x, with s = 1 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.s * x


def layer_scales(model: PeftModel) -> list[nn.Parameter]:
    """Have one number for each layer scale what the adapter writes there, and train these numbers alone.

    B of a LoRA, the up-projection of a bottleneck and the values of a prefix are multiplied.

    Args:
        model: a model with a plain adapter, after `merge_projections`.

    Returns:
        The scales, from the first layer to the last.
    """
    parts = parts_of(model)
    folded = not any(isinstance(part.owner, Computed) for part in parts)
    check("model", type(model).__name__, folded, "has an adapter that is not folded yet")
    model.requires_grad_(False)
    scales: dict[int, Scale] = {}
    for part in parts:
        written = [axis for axis in part.axes if axis.side == "write" and part.layer >= 0 and part.tensor != "P_K"]
        for axis in written[:1]:
            if not part.tensor.endswith(".P_K"):
                scale = scales.setdefault(part.layer, Scale())
                parametrize(part, part, [Step(axis.dim, size_along(part.value, axis), [Block(scale, None, None)])])
                part.owner.get_submodule(SEEN + part.name).original.requires_grad_(False)  # pyright: ignore
    return [scales[layer].s for layer in sorted(scales)]


def size_along(value: Tensor, axis: Axis) -> int:
    return value.shape[0] * value.shape[2] if axis.dim is None else value.shape[axis.dim]
