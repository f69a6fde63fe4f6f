"""The training loop of searches and of plug-in transfer: AdamW, clipped gradients, a learning rate schedule."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import get_scheduler

BatchT = TypeVar("BatchT")


def train_steps(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[BatchT], Tensor],
    batches: Iterable[BatchT],
    steps: int,
    lr: float,
    warmup_steps: int,
    scheduler: str = "linear",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    fused: bool | None = None,
) -> Iterator[Tensor]:
    """Train parameters, one AdamW step for each batch. A step is done when its loss is asked for.

    transformers' Trainer does the same for a whole model with its arguments, callbacks and checkpoints. This loop is
    for hundreds of short runs, where building a Trainer takes longer than a step.

    Args:
        parameters: the parameters to train.
        loss: the loss of a batch, shape: ().
        batches: at least `steps` of them, or all that there are.
        steps: the number of steps, which the schedule ends with.
        lr: the highest learning rate.
        warmup_steps: steps in which the learning rate rises.
        scheduler: a name that `transformers.get_scheduler` knows.
        weight_decay: of AdamW.
        max_grad_norm: the norm that gradients are clipped to.
        fused: AdamW in one kernel; None for torch's choice.

    Yields:
        The loss of each step, detached, after the step.
    """
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=fused)
    schedule = get_scheduler(scheduler, optimizer, warmup_steps, steps)
    for batch in islice(batches, steps):
        value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield value.detach()
