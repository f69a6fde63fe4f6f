"""Batches of examples with answer choices: the right choices, the denominators of the losses, scores."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from hf_peft_ext.ranking.losses import IGNORED, Averaging, TokenScores

ChoiceBatch = Mapping[str, Tensor]  # of `DataCollatorForChoices`


def sizes(batch: ChoiceBatch) -> Tensor:  # shape: (examples,)
    """The number of choices of each example."""
    return torch.bincount(batch["example"], minlength=len(batch["prompt_ids"]))


def first_rows(batch: ChoiceBatch) -> Tensor:  # shape: (examples,)
    """The row of the first choice of each example."""
    return sizes(batch).cumsum(0) - sizes(batch)


def right(batch: ChoiceBatch) -> Tensor:  # shape: (rows,)
    """Whether each row is its example's answer."""
    correct = torch.zeros_like(batch["example"], dtype=torch.bool)
    correct[first_rows(batch) + batch["answer"]] = True
    return correct


def answers_alone(batch: ChoiceBatch) -> dict[str, Tensor]:
    """The batch without the wrong choices."""
    correct = right(batch)
    answers = {name: batch[name][correct] for name in ("choice_ids", "example", "lengths")}
    return {**batch, **answers, "answer": torch.zeros_like(batch["answer"])}


def loss_counts(batch: ChoiceBatch, average: Averaging) -> Tensor:  # shape: (3,)
    """A batch's share of the denominators of `lm_loss`, `choice_loss` and `unlikelihood_loss`."""
    correct, tokens = right(batch), (batch["choice_ids"] != IGNORED).sum(1)
    ranked = (sizes(batch) > 1).sum()
    if average == "token":
        return torch.stack([tokens[correct].sum(), ranked, tokens[~correct].sum()])
    return torch.stack([correct.sum(), ranked, ranked])


# Trainer joins the scores of several batches and processes, and pads shorter ones with -100. A sum of
# log-probabilities can be -100; its negative, which is passed to Trainer, cannot.

NO_CHOICE = -100.0


def costs(tokens: TokenScores, batch: ChoiceBatch) -> Tensor:  # shape: (examples, most choices)
    """-log p of each choice over its length; `NO_CHOICE` where an example has fewer choices."""
    example, count = batch["example"], sizes(batch)
    column = torch.arange(len(example), device=example.device) - first_rows(batch)[example]
    padded = tokens.log_p.new_full((len(count), int(count.max())), NO_CHOICE)
    padded[example, column] = -tokens.row_sums(tokens.log_p) / batch["lengths"]
    return padded


def scores(joined: Any) -> Any:
    """Costs as scores: an array, a tensor, a list of them, or None, as it came."""
    if joined is None or isinstance(joined, list):
        return joined and [scores(one) for one in joined]
    where = torch.where if isinstance(joined, Tensor) else np.where
    return where(joined == NO_CHOICE, -torch.inf, -joined)


def with_scores(compute: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Wrap a user's `compute_metrics`: Trainer calls it with costs, and it gets scores."""

    @wraps(compute)
    def computed(evaluated: EvalPrediction, **kwargs: Any) -> dict[str, float]:
        ranked, more = scores(evaluated.predictions), {"inputs": evaluated.inputs, "losses": evaluated.losses}
        return compute(EvalPrediction(ranked, evaluated.label_ids, **more), **kwargs)

    return computed
