"""The tasks that a plugged model is trained and measured on: rows, a loss, and a score for each answer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_peft_ext.model.modes import evaluating
from hf_peft_ext.ranking.classifier import score_choices
from hf_peft_ext.ranking.encode import collate, encode_choices
from hf_peft_ext.ranking.losses import IGNORED, choice_scores
from hf_peft_ext.ranking.packing import bare, choice_token_scores
from hf_peft_ext.validation.checks import check

Row = Mapping[str, Any]


class Task(ABC):
    """A loss over the answers of rows, and a score for each answer; the model's answer has the highest.

    A row has the index of the right answer, or as `target` the probability q_k of each answer, or both. Then it is
    trained towards the target and measured by the answer.
    """

    asks: ClassVar[tuple[str, ...]]  # the fields of a row that a model reads
    answer: ClassVar[str]  # the field with the index of the right answer

    @abstractmethod
    def log_probabilities(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:  # shape of each: (answers,)
        """log p_k of each answer of each row, with gradients."""

    @abstractmethod
    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:  # shape of each: (answers,)
        """The same in evaluation mode, without gradients, on the CPU."""

    @abstractmethod
    def batch(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The rows with their right answers as `labels`, as the model takes them."""

    def loss(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:  # shape: ()
        """L = -sum_k q_k log p_k, the mean over the rows with at least two answers; with gradients.

        Raises:
            ValueError: a row has neither a target nor an answer, or one that does not fit.
        """
        log_p = self.log_probabilities(model, rows)
        q = torch.cat([self.target(row, len(of_row)) for row, of_row in zip(rows, log_p, strict=True)])
        together = torch.cat(log_p)
        return -(q.to(together) * together).sum() / max(1, sum(len(of_row) > 1 for of_row in log_p))

    def target(self, row: Row, answers: int) -> Tensor:  # shape: (answers,)
        """q_k of one row; without a target, 1 for the right answer and 0 for the others."""
        target = row.get("target")
        if target is not None:
            q = torch.as_tensor(target, dtype=torch.float32, device="cpu")
            fits = q.shape == (answers,) and bool((q >= 0).all()) and abs(float(q.sum()) - 1) < 1e-3
            check("target", target, fits, f"must be a probability for each of {answers} answers, 1 in sum")
            return q
        (right,) = self.answers([row])
        check(self.answer, right, right < answers, f"must be the index of one of {answers} answers")
        return torch.arange(answers).eq(right).float()

    def answers(self, rows: Sequence[Row]) -> list[int]:
        """The index of the right answer of each row.

        Raises:
            ValueError: a row has none, or a negative one, by which data sets mark an unknown answer.
        """
        for row in rows:
            right: Any = row.get(self.answer)
            check("rows", sorted(row), right is not None, f"must have `{self.answer}`")
            check(self.answer, right, right >= 0, "must be the index of an answer")
        return [row[self.answer] for row in rows]


@dataclass
class Ranking(Task):
    """Rows with `prompt`, `choices` and `answer` (an index): a language model ranks the choices by their likelihood.

    log p is the log-softmax of the choices' mean log-probabilities, so the loss is T-Few's choice loss
    (`losses.choice_loss`). It is over the choices alone: the likelihood over the whole vocabulary would
    first teach the format of answers.

    Args:
        tokenizer: the model's.
    """

    asks = ("prompt", "choices")
    answer = "answer"

    tokenizer: PreTrainedTokenizerBase

    def log_probabilities(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        base = bare(model)
        seq2seq = base.config.is_encoder_decoder
        examples = [encode_choices(self.tokenizer, row["prompt"], row["choices"], seq2seq) for row in rows]
        device = base.get_input_embeddings().weight.device
        batch = {key: value.to(device) for key, value in collate(examples).items()}
        # packed, an encoder-decoder copies its states for each choice in the pruned copy of a delta bridge only
        tokens = choice_token_scores(model, batch, packed=False if seq2seq else None)
        scores = choice_scores(tokens).split([len(example.choices) for example in examples])
        return [score.log_softmax(0) for score in scores]

    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        choices = [row["choices"] for row in rows]
        scores = score_choices(model, self.tokenizer, [row["prompt"] for row in rows], choices)
        return [score.log_softmax(0) for score in scores]

    def batch(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, Tensor]:
        base = bare(model)
        seq2seq = base.config.is_encoder_decoder
        pairs = zip(rows, self.answers(rows), strict=True)
        texts = ((row["prompt"], row["choices"][right]) for row, right in pairs)
        examples = [encode_choices(self.tokenizer, prompt, [right], seq2seq) for prompt, right in texts]
        ids, labels = [example.prompt for example in examples], [example.choices[0] for example in examples]
        if not seq2seq:
            ids = [prompt + right for prompt, right in zip(ids, labels, strict=True)]
            labels = [[IGNORED] * len(e.prompt) + e.choices[0] for e in examples]
        mask = [[1] * len(row) for row in ids]
        batch = {"input_ids": padded(ids, 0), "attention_mask": padded(mask, 0), "labels": padded(labels, IGNORED)}
        return {name: value.to(base.get_input_embeddings().weight.device) for name, value in batch.items()}


def padded(rows: Sequence[list[int]], value: int) -> Tensor:  # shape: (rows, length)
    """Rows padded on the right with a value."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


@dataclass
class Classification(Task):
    """Rows with `text` and `label` (an index): a model with a classification head.

    Args:
        tokenizer: the model's.
        batch_size: rows in a forward pass of `scores`.
    """

    asks = ("text",)
    answer = "label"

    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32

    def log_probabilities(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        return list(model(**self.inputs(model, rows)).logits.float().log_softmax(-1))

    @torch.no_grad()
    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        with evaluating(model):
            parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            return [score.cpu() for part in parts for score in self.log_probabilities(model, part)]

    def inputs(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The texts of rows, tokenized and padded, on the model's device."""
        texts = [row["text"] for row in rows]
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return {name: value.to(next(model.parameters()).device) for name, value in inputs.items()}

    def batch(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, Tensor]:
        inputs = self.inputs(model, rows)
        return {**inputs, "labels": torch.tensor(self.answers(rows), device=inputs["input_ids"].device)}


def task_for(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Task:
    """The task for rows: ranking for `prompt` and `choices`, classification for `text`.

    Args:
        tokenizer: of the models.
        rows: with or without answers.

    Raises:
        ValueError: there are no rows, or they have neither of these fields.
    """
    check("rows", len(rows), len(rows) > 0, "must hold at least one row")
    kinds = [kind for kind in (Ranking, Classification) if all({*kind.asks} <= row.keys() for row in rows)]
    check("rows", sorted(rows[0]), bool(kinds), "must have `prompt` and `choices`, or `text`, all of them alike")
    return kinds[0](tokenizer)
