"""Training in one stage of plug-in transfer: by gradients, or by MeZO's forward passes."""

import random
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from hf_peft_ext.training_loop import train_steps
from hf_peft_ext.transfer.refine.mezo import MeZO, trained
from hf_peft_ext.transfer.run.task import Row, Task

WARM_UP = 0.1  # share of the steps in which the learning rate rises

Advance = Callable[[], object]


def row_batches(rows: Sequence[Row], batch_size: int, seed: int) -> Iterator[list[Row]]:
    """Batches without end; the rows are shuffled for each pass."""
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
    """Train the trainable parameters with AdamW; gradients are clipped to norm 1.

    Args:
        model: a model, in evaluation mode afterwards.
        task: the rows'.
        rows: with answers or targets.
        steps: of `batch_size` rows each.
        lr: the highest learning rate; it rises over the first tenth of the steps and falls to 0.
        batch_size: rows in a step.
        seed: of the rows' order.
        dropout: whether the model is in training mode; a delta bridge must not be.
        advance: called after each step.
    """
    model.train(dropout)
    batches = row_batches(rows, batch_size, seed)
    for _ in train_steps(
        trained(model), lambda batch: task.loss(model, batch), batches, steps, lr, round(WARM_UP * steps)
    ):
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
    """Train the trainable parameters with MeZO, in the memory of inference.

    Args:
        eps: of MeZO; the rest as in `fit`.
    """
    model.eval()
    optimizer = MeZO(trained(model), lr, eps, seed=seed)
    for _, batch in zip(range(steps), row_batches(rows, batch_size, seed), strict=False):
        optimizer.step(lambda batch=batch: task.loss(model, batch))
        advance()
