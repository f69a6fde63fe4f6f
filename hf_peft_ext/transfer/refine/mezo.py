"""Training by forward passes alone, in the memory of inference: MeZO, and scales of layers for it to train."""

from collections.abc import Callable, Iterable, Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_peft_ext.transfer.map.adapter_tensors import HEAD, AdapterTensors
from hf_peft_ext.transfer.map.parametrize import Block, Step, is_projected, parametrize
from hf_peft_ext.validation.checks import check, check_positive


class MeZO:
    """theta <- theta - lr (g z + lambda theta),  g = (L(theta + eps z) - L(theta - eps z)) / (2 eps),  z ~ N(0, I).

    Malladi et al. 2023 (https://arxiv.org/abs/2305.17333), Algorithm 1: g estimates the slope of the loss along z. The
    noise is never stored: it is drawn again from its seed, tensor by tensor. The paper restores theta by subtracting,
    which leaves rounding errors; here a copy of the trained parameters is kept, so that a step of length 0 changes no
    bit. For an adapter the copy is small beside the model.

    Args:
        parameters: the parameters to train.
        lr: the learning rate.
        eps: the distance of the two losses from theta.
        samples: the number of z that a step averages over, two losses each.
        weight_decay: lambda.
        seed: of the noise.

    Raises:
        ValueError: `eps` or `samples` is not positive, or there is no parameter.
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
        check("parameters", len(self.parameters), bool(self.parameters), "must hold at least one")
        check_positive("eps", eps)
        check("samples", samples, type(samples) is int and samples > 0, "must be a positive whole number")
        self.lr, self.eps, self.samples, self.weight_decay = lr, eps, samples, weight_decay
        self.seeds = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor]) -> float:
        """One step.

        Args:
            loss: the loss at the current parameters, with the same batch and dropout in each call.

        Returns:
            The mean of the losses at theta + eps z and theta - eps z.
        """
        start = [p.detach().clone() for p in self.parameters]
        slopes, losses = [], []
        for seed in torch.randint(2**62, (self.samples,), generator=self.seeds).tolist():
            above, below = (self._loss_at(start, seed, sign * self.eps, loss) for sign in (1, -1))
            slopes.append((seed, (above - below) / (2 * self.eps)))
            losses += [above, below]
        for p, value in zip(self.parameters, start, strict=True):
            p.copy_(value)
        for p in self.parameters:
            p.mul_(1 - self.lr * self.weight_decay)
        for seed, slope in slopes:
            for p, z in self._noise(seed):
                p.add_(z, alpha=-self.lr * slope / self.samples)
        return sum(losses) / len(losses)

    @torch.no_grad()
    def slope(self, loss: Callable[[], Tensor], seed: int) -> float:
        """g along the z of a seed. The parameters don't change.

        Args:
            loss: as of `step`.
            seed: of z.
        """
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
    """Scale what the adapters add in each layer by one number, and train these numbers alone.

    B of a LoRA, the up-projection of a bottleneck and the values of a prefix are multiplied.

    Args:
        model: a model with plain adapters, after `merge_projections`.

    Returns:
        The scales, from the first layer to the last.

    Raises:
        ValueError: a tensor of an adapter is still computed through projections.
    """
    return add_layer_scales(AdapterTensors(model))


def add_layer_scales(tensors: AdapterTensors) -> list[nn.Parameter]:
    """As `layer_scales`, from tensors that were read already."""
    model = tensors.model
    merged = not any(is_projected(tensor.owner) for tensor in tensors)
    check("model", type(model).__name__, merged, "must have its projections merged first, see `merge_projections`")
    model.requires_grad_(False)
    scales: dict[int, Scale] = {}
    for tensor in tensors:
        outputs = [axis for axis in tensor.axes if axis.side == "out"]
        if outputs and tensor.layer != HEAD and not tensor.tensor.endswith("P_K"):
            scale = scales.setdefault(tensor.layer, Scale())
            step = Step(outputs[0].dim, outputs[0].size(tensor.value), [Block(scale, None, None)])
            parametrize(tensor, tensor, [step])
            tensor.owner.parametrizations[tensor.name].original.requires_grad_(False)  # pyright: ignore
    return [scales[layer].s for layer in sorted(scales)]
