"""Trains a LoRA to predict what an adapter predicts, on texts without labels."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_peft_ext.export.divergence import PredictionKind, divergence
from hf_peft_ext.export.inputs import Inputs, logits_of, predictions_that_count
from hf_peft_ext.export.least_squares import fit_least_squares
from hf_peft_ext.export.roles import Roles
from hf_peft_ext.training_loop import train_steps
from hf_peft_ext.transfer.run.task import Row
from hf_peft_ext.validation.checks import check, check_count, check_positive, is_number

AFTER_FIT, WITHOUT_FIT, OF_LANGUAGE_MODELS = 3e-4, 4e-3, 1e-3  # learning rates
FIT_ROWS = 128


@dataclass(frozen=True)
class DistillationSettings:
    """How a LoRA is distilled from an adapter.

    Args:
        steps: training steps; 0 for the least-squares fit alone.
        batch_size: rows of a step.
        learning_rate: the highest learning rate; it rises over a tenth of the steps, and falls linearly. None for 3e-4
            after a fit, which a higher one spoils before it improves it; where nothing was fitted (without `fit_rows`,
            or for a ladder, which changes no leaf) for 4e-3, or 1e-3 for a language model.
        fit_rows: rows of the least-squares fit that training begins from; 0 to begin with B = 0. None for 128, or 0
            for a language model that is trained: there the fit, five forward passes for each block, took longer than
            training, and the result ranked answers worse (SmolLM2).
        held_out: share of the texts that is kept for measuring, at least one.
        max_length: longer texts are cut to so many tokens; None for the tokenizer's own limit.
        max_new_tokens: length of the answers that an encoder-decoder generates for texts without labels.
        seed: of the order of rows, and of the first A.

    Raises:
        ValueError: a value breaks its rule.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float | None = None
    fit_rows: int | None = None
    held_out: float = 0.1
    max_length: int | None = None
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            check_count(name, getattr(self, name))
        for name, optional in (("steps", False), ("fit_rows", True)):
            value = getattr(self, name)
            counts = (type(value) is int and value >= 0) or (optional and value is None)
            check(name, value, counts, "must be a whole number, 0 or more")
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        fits = is_number(self.held_out) and 0 < self.held_out < 1
        check("held_out", self.held_out, fits, "must lie between 0 and 1")


def distil(
    roles: Roles, inputs: Inputs, rows: Sequence[Row], kind: PredictionKind, settings: DistillationSettings
) -> Iterator[float]:
    """Train the LoRA of an attached model by L = mean KL(adapter || LoRA).

    The adapter's predictions are computed from the same weights, switched from one role to the other. They are kept
    where a row has one prediction only.

    Args:
        roles: the model.
        inputs: makes batches.
        rows: rows of tokens.
        kind: of the predictions.
        settings: steps, rate, and the fit to begin from.

    Yields:
        The loss of each step.
    """
    base: Any = roles.base
    generator, writes = random.Random(settings.seed), base.can_generate()
    fit_rows = settings.fit_rows
    if fit_rows is None:
        fit_rows = 0 if writes and settings.steps else FIT_ROWS
    if fit_rows:
        chosen = generator.sample(rows, min(fit_rows, len(rows)))
        chosen.sort(key=lambda row: len(row["input_ids"]))  # less padding
        fit_least_squares(roles, list(inputs.batches(chosen, settings.batch_size)))
    kept: dict[int, Tensor] = {}

    def loss(indices: Sequence[int]) -> Tensor:
        batch = inputs.collate([rows[i] for i in indices])
        teacher = taught(roles, inputs, batch, indices, kept)
        roles.use("lora")
        logits = logits_of(roles.model, batch)
        student = logits[predictions_that_count(logits, batch, inputs.writes_answers)]
        return divergence(teacher, student, kind).mean()

    rate = settings.learning_rate
    if rate is None:
        without = OF_LANGUAGE_MODELS if writes else WITHOUT_FIT
        rate = AFTER_FIT if any(roles.branch(path).B.any() for path in roles.leaves) else without
    order = endless_batches(len(rows), settings.batch_size, generator)
    for value in train_steps(roles.parameters(), loss, order, settings.steps, rate, settings.steps // 10):
        yield value.item()


@torch.no_grad()
def taught(
    roles: Roles, inputs: Inputs, batch: dict[str, Tensor], indices: Sequence[int], kept: dict[int, Tensor]
) -> Tensor:  # shape: (predictions, classes)
    """The adapter's predictions for a batch, from `kept` where all are there."""
    if all(i in kept for i in indices):
        return torch.stack([kept[i] for i in indices])
    roles.use("adapter")
    logits = logits_of(roles.model, batch)
    if logits.ndim == 2:
        kept.update(zip(indices, logits, strict=True))
    return logits[predictions_that_count(logits, batch, inputs.writes_answers)]


def endless_batches(n: int, batch_size: int, generator: random.Random) -> Iterator[list[int]]:
    """Batches of indices below n, without end, each epoch in another order."""
    while True:
        order = generator.sample(range(n), n)
        yield from (order[i : i + batch_size] for i in range(0, n, batch_size))
