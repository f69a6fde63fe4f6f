"""How much of a plugged module is let through: a factor chosen on rows, 0 (the untouched model) among the choices."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel

from hf_peft_ext.model.modes import preserve_requires_grad
from hf_peft_ext.transfer.map.adapter_tensors import Part, parts_of
from hf_peft_ext.transfer.run.result import Measured, log_likelihood
from hf_peft_ext.transfer.run.task import Row, Task


@contextmanager
def at_scale(model: PeftModel, scale: float) -> Iterator[None]:
    """The model with what its adapter writes times `scale`; 0 is the model without it, head included.

    Only what adds to the model can be scaled: LoRA and bottlenecks. A prefix is there (1) or not (0).
    """
    with preserve_requires_grad(model):
        if scale == 0:
            with model.disable_adapter():
                yield
            return
        written = writing(model)
        before = [part.value.detach().clone() for part in written]
        try:
            scale_by(written, scale)
            yield
        finally:
            with torch.no_grad():
                for part, value in zip(written, before, strict=True):
                    part.value.copy_(value)


@torch.no_grad()
def scale_by(parts: Sequence[Part], scale: float) -> None:
    for part in parts:
        part.value.mul_(scale)


def writing(model: PeftModel) -> list[Part]:
    """The tensors of an adapter that add to the model, in the blocks."""
    return [
        part
        for part in parts_of(model)
        if part.layer >= 0 and any(axis.side == "write" and axis.dim is not None for axis in part.axes)
    ]


def choose_scale(
    model: PeftModel, task: Task, rows: Sequence[Row], scales: Sequence[float]
) -> tuple[float, dict[float, float]]:
    """The scale at which most answers are right, and the share of right answers at each.

    Of equals, the one at which the right answers are likeliest, then the smaller. (Likelihood does not come first: a
    module trained on few rows is too sure of itself, and would be scaled down while it still gains.)
    """
    answers = task.answers(rows)
    accuracy, likelihood = {}, {}
    for scale in sorted({0.0, 1.0} if has_prefix(model) else {0.0, *map(float, scales)}):
        with at_scale(model, scale):
            scores = task.scores(model, rows)
        accuracy[scale] = Measured.of(scores, answers).accuracy
        likelihood[scale] = log_likelihood(scores, answers)
    return max(accuracy, key=lambda scale: (accuracy[scale], likelihood[scale], -scale)), accuracy


def has_prefix(model: PeftModel) -> bool:
    return any(axis.dim is None for part in parts_of(model) for axis in part.axes)
