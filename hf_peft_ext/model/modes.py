"""Changes of a model's modes for the length of a `with` block: evaluation, and which parameters are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def preserve_requires_grad(model: nn.Module) -> Iterator[None]:
    """Put back afterwards which parameters are trained; peft changes it when it disables or enables an adapter."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a trained parameter; afterwards the model has its modes again."""
    with evaluating(model), preserve_requires_grad(model):
        model.requires_grad_(False)
        yield
