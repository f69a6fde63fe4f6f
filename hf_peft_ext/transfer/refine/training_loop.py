"""The steps of every stage: batches of rows, a loss, and gradients or two forward passes."""

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from hf_peft_ext.transfer.refine.mezo import MeZO, trained
from hf_peft_ext.transfer.run.task import Row, Task

WARM_UP = 0.1  # share of the steps in which the rate rises

Advance = Callable[[], object]


def batches(rows: Sequence[Row], batch_size: int, seed: int) -> Iterator[list[Row]]:
    """Batches without end, the rows in another order each time round."""
    order = random.Random(seed)
    while True:
        drawn = order.sample(rows, len(rows))
        yield from (drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size))


def fit(
    model: nn.Module,
    task: Task,
    rows: Sequence[Row],
    steps: int,
    lr: float,
    batch_size: int = 8,
    seed: int = 0,
    dropout: bool = False,
    advance: Advance = lambda: None,
) -> None:
    """AdamW with gradients clipped at 1, on what of a model is trained.

    Args:
        steps: of `batch_size` rows.
        lr: the highest rate; it rises over the first tenth of the steps and falls to 0.
        dropout: whether the model is in training mode; a delta bridge must not be.
        advance: called at each step.
    """
    model.train(dropout)
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    for _, batch in zip(range(steps), batches(rows, batch_size, seed), strict=False):
        task.loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance()
    model.eval()


def refine(
    model: nn.Module,
    task: Task,
    rows: Sequence[Row],
    steps: int,
    lr: float,
    batch_size: int = 16,
    eps: float = 1e-3,
    seed: int = 0,
    advance: Advance = lambda: None,
) -> None:
    """The same by MeZO, in the memory of inference."""
    model.eval()
    optimizer = MeZO(trained(model), lr, eps, seed=seed)
    for _, batch in zip(range(steps), batches(rows, batch_size, seed), strict=False):
        optimizer.step(lambda batch=batch: task.loss(model, batch))
        advance()
