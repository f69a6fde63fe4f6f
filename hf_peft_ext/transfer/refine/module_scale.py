"""A factor on what the adapters add, chosen on rows; 0, the model without adapters, is among the choices."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from hf_peft_ext.model.modes import preserve_requires_grad
from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensor, AdapterTensors
from hf_peft_ext.transfer.run.result import Measured, log_likelihood
from hf_peft_ext.transfer.run.task import Row, Task


@contextmanager
def at_scale(tensors: AdapterTensors, scale: float) -> Iterator[None]:
    """Multiply what the adapters add by `scale`, within the context; 0 disables the adapters, head included.

    LoRA and bottlenecks can be scaled. A prefix is present (1) or not (0).
    """
    model = tensors.model
    with preserve_requires_grad(model):
        if scale == 0:
            with model.disable_adapter():
                yield
            return
        added = tensors.added()
        before = [tensor.value.detach().clone() for tensor in added]
        try:
            scale_by(added, scale)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(added, before, strict=True):
                    tensor.value.copy_(value)


@torch.no_grad()
def scale_by(tensors: Sequence[AdapterTensor], scale: float) -> None:
    """Multiply tensors by a number, in place."""
    for tensor in tensors:
        tensor.value.mul_(scale)


def choose_scale(
    tensors: AdapterTensors, task: Task, rows: Sequence[Row], scales: Sequence[float]
) -> tuple[float, dict[float, float]]:
    """The scale at which most answers are right, and the accuracy at each.

    Ties are broken by the likelihood of the right answers, then by the smaller scale. (Likelihood does not come first:
    an adapter trained on few rows is overconfident, and would be scaled down while it still gains.)
    """
    answers = task.answers(rows)
    accuracy, likelihood = {}, {}
    for scale in sorted({0.0, 1.0} if tensors.has_prefix else {0.0, *map(float, scales)}):
        with at_scale(tensors, scale):
            scores = task.scores(tensors.model, rows)
        accuracy[scale] = Measured.of(scores, answers).accuracy
        likelihood[scale] = log_likelihood(scores, answers)
    return max(accuracy, key=lambda scale: (accuracy[scale], likelihood[scale], -scale)), accuracy
