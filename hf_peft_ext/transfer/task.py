"""What a plugged model is trained and judged by: rows of data, a loss, and a score for each answer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..choices import collate, encode_choices
from ..losses import choice_loss, lm_loss
from ..packing import bare, choice_token_scores
from ..placement import check
from ..rank_classification import evaluating, score_choices

Row = Mapping[str, Any]


class Task(ABC):
    """A loss over the answers of rows, and the score of each answer; the highest is the model's."""

    @abstractmethod
    def loss(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:  # shape: ()
        """With gradients."""

    @abstractmethod
    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:  # shape of each: (answers,)
        """Log-probabilities, without gradients."""

    @abstractmethod
    def answers(self, rows: Sequence[Row]) -> list[int]:
        """The index of the right answer of each row."""


@dataclass
class Ranking(Task):
    """Rows of `prompt`, `choices` and `answer` (an index): a language model is asked which choice it finds likeliest.

    The loss is T-Few's choice loss (`losses.choice_loss`), over the choices alone: the likelihood of the answer over
    the whole vocabulary teaches the format of answers first.

    Args:
        tokenizer: the model's.
        lm_weight: how much of `losses.lm_loss` is added.
    """

    tokenizer: PreTrainedTokenizerBase
    lm_weight: float = 0.0

    def loss(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        base = bare(model)
        seq2seq = base.config.is_encoder_decoder
        examples = [encode_choices(self.tokenizer, row["prompt"], row["choices"], seq2seq) for row in rows]
        device = base.get_input_embeddings().weight.device
        batch = {key: value.to(device) for key, value in collate(examples).items()}
        correct = torch.tensor([i == row["answer"] for row in rows for i in range(len(row["choices"]))], device=device)
        tokens = choice_token_scores(model, batch)
        loss = choice_loss(tokens, correct, batch["example"])
        return loss + self.lm_weight * lm_loss(tokens, correct) if self.lm_weight else loss

    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        choices = [row["choices"] for row in rows]
        found = score_choices(model, self.tokenizer, [row["prompt"] for row in rows], choices)
        return [score.log_softmax(0) for score in found]

    def answers(self, rows: Sequence[Row]) -> list[int]:
        return [row["answer"] for row in rows]


@dataclass
class Classification(Task):
    """Rows of `text` and `label` (an index): a model with a classification head.

    Args:
        tokenizer: the model's.
        batch_size: rows in a forward when they are scored.
    """

    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32

    def loss(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        logits = self.logits(model, rows)
        return F.cross_entropy(logits, torch.tensor(self.answers(rows), device=logits.device))

    @torch.no_grad()
    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        with evaluating(model):
            parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            return [score for part in parts for score in self.logits(model, part).float().cpu().log_softmax(-1)]

    def logits(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:  # shape: (rows, labels)
        device = next(model.parameters()).device
        texts = [row["text"] for row in rows]
        return model(**self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)).logits

    def answers(self, rows: Sequence[Row]) -> list[int]:
        return [row["label"] for row in rows]


def task_for(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Task:
    """The task that rows belong to.

    Raises:
        ValueError: there are none, or they are of neither kind.
    """
    check("rows", len(rows), len(rows) > 0, "must hold at least one row")
    if all({"prompt", "choices", "answer"} <= row.keys() for row in rows):
        return Ranking(tokenizer)
    both = all({"text", "label"} <= row.keys() for row in rows)
    check("rows", sorted(rows[0]), both, "must have `prompt`, `choices` and `answer`, or `text` and `label`")
    return Classification(tokenizer)
