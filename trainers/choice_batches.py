"""What is read off a batch of examples with answer choices: which are right, what losses are means over, scores."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from hf_peft_ext.ranking.losses import IGNORED, Averaging, TokenScores

Batch = Mapping[str, Tensor]  # as `DataCollatorForChoices` makes it


def sizes(batch: Batch) -> Tensor:  # shape: (examples,)
    """How many choices each example has."""
    return torch.bincount(batch["example"], minlength=len(batch["prompt_ids"]))


def starts(batch: Batch) -> Tensor:  # shape: (examples,)
    """The row of the first choice of each example."""
    return sizes(batch).cumsum(0) - sizes(batch)


def right(batch: Batch) -> Tensor:  # shape: (rows,)
    """Whether a row is the answer."""
    correct = torch.zeros_like(batch["example"], dtype=torch.bool)
    correct[starts(batch) + batch["answer"]] = True
    return correct


def answers_alone(batch: Batch) -> dict[str, Tensor]:
    """The batch without the wrong choices."""
    correct = right(batch)
    answers = {name: batch[name][correct] for name in ("choice_ids", "example", "lengths")}
    return {**batch, **answers, "answer": torch.zeros_like(batch["answer"])}


def loss_counts(batch: Batch, average: Averaging) -> Tensor:  # shape: (3,)
    """What a batch adds to the counts of `lm_loss`, `choice_loss` and `unlikelihood_loss`."""
    correct, tokens = right(batch), (batch["choice_ids"] != IGNORED).sum(1)
    ranked = (sizes(batch) > 1).sum()
    if average == "token":
        return torch.stack([tokens[correct].sum(), ranked, tokens[~correct].sum()])
    return torch.stack([correct.sum(), ranked, ranked])


# Scores. Trainer joins what comes from several batches and processes, and where one is shorter fills it with -100,
# which a sum of log-probabilities can be. Handed to it is their negative, which is 0 or more.

NO_CHOICE = -100.0


def costs(tokens: TokenScores, batch: Batch) -> Tensor:  # shape: (examples, most choices)
    """-log p of each choice over its length, and `NO_CHOICE` where an example has no such choice."""
    example, count = batch["example"], sizes(batch)
    column = torch.arange(len(example), device=example.device) - starts(batch)[example]
    found = tokens.log_p.new_full((len(count), int(count.max())), NO_CHOICE)
    found[example, column] = -tokens.row_sums(tokens.log_p) / batch["lengths"]
    return found


def scores(joined: Any) -> Any:
    """The scores that such costs are, as they come: an array, a tensor, a list of them, or None."""
    if joined is None or isinstance(joined, list):
        return joined and [scores(one) for one in joined]
    where = torch.where if isinstance(joined, Tensor) else np.where
    return where(joined == NO_CHOICE, -torch.inf, -joined)


def with_scores(compute: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """`compute_metrics` as a user writes it, called with scores where Trainer has costs."""

    @wraps(compute)
    def computed(evaluated: EvalPrediction, **kwargs: Any) -> dict[str, float]:
        found, more = scores(evaluated.predictions), {"inputs": evaluated.inputs, "losses": evaluated.losses}
        return compute(EvalPrediction(found, evaluated.label_ids, **more), **kwargs)

    return computed
