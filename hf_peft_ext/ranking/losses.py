"""The losses of T-Few.

T-Few (Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.2) trains a model to rank answer choices. Each
choice of each example is a row of logits and labels. Rows with the same number in `example` are choices of one
example; examples may have different numbers of choices. `correct` marks the rows of the answers:

    tokens = token_scores(logits, labels)
    loss = (
        lm_loss(tokens, correct)
        + choice_loss(tokens, correct, example)
        + unlikelihood_loss(tokens, correct, example)
    )

Everything is computed in float32 and in log space. Every loss is a sum divided by a count. If micro-batches or
processes share a mean, pass its total `count`: their losses then add up to the loss of one big batch.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_peft_ext.validation.checks import check

IGNORED = -100  # the label of ignored tokens in transformers

Averaging = Literal["token", "example"]


class TokenScores(NamedTuple):
    """Log-probabilities of the labelled tokens of all rows.

    Args:
        log_p: log p of the label, shape (tokens,).
        log_rest: log(1 - p), where 1 - p is the probability of all other tokens, shape (tokens,).
        row: the row of each token, shape (tokens,).
        rows: number of rows.
    """

    log_p: Tensor
    log_rest: Tensor
    row: Tensor
    rows: int

    @property
    def lengths(self) -> Tensor:  # shape: (rows,)
        """The number of labelled tokens in each row."""
        return torch.bincount(self.row, minlength=self.rows)

    def row_sums(
        self,
        value: Tensor,  # shape: (tokens,)
    ) -> Tensor:  # shape: (rows,)
        """Sums of a value of each token, by rows."""
        return value.new_zeros(self.rows).index_add(0, self.row, value)


def token_scores(
    logits: Tensor,  # shape: (rows, length, vocab): each position predicts the label at the same position
    labels: Tensor,  # shape: (rows, length): -100 at ignored tokens
) -> TokenScores:
    """The log-probabilities of the labels, and of all other tokens.

    log(1 - p) is log sum_{j != label} exp(l_j) - log sum_j exp(l_j), which stays exact where p is nearly 1 and
    1 - exp(log p) would be 0.

    Raises:
        ValueError: the shapes do not agree, or all labels of a row are ignored.
    """
    rule = f"must have the shape of `logits` without the vocabulary, {tuple(logits.shape[:-1])}"
    check("labels", tuple(labels.shape), labels.shape == logits.shape[:-1], rule)
    labelled = labels != IGNORED
    empty = (~labelled.any(dim=1)).nonzero()[:, 0].tolist()
    check("labels", empty, not empty, f"has rows in which every label is {IGNORED}")
    scores, label = logits[labelled].float(), labels[labelled].unsqueeze(1)  # (tokens, vocab), (tokens, 1)
    z = scores.logsumexp(dim=-1)  # (tokens,)
    log_p = scores.gather(1, label).squeeze(1) - z
    log_rest = scores.scatter(1, label, -torch.inf).logsumexp(dim=-1) - z
    return TokenScores(log_p, log_rest, labelled.nonzero()[:, 0], len(labels))


def lm_loss(
    tokens: TokenScores,
    correct: Tensor,  # shape: (rows,): whether a row is the answer
    average: Averaging = "token",
    count: Tensor | float | None = None,
) -> Tensor:  # shape: ()
    """L_LM = -1/T sum_t log p_t over the T tokens of the answers.

    Args:
        average: "token": the mean over all tokens, as in the paper's code. "example": the mean over the tokens of each
            answer, then over the answers. Both are equal for one example.
        count: the number of tokens (or answers) in the whole step; None for this batch.
    """
    nll = -tokens.row_sums(tokens.log_p)[correct]  # (answers,)
    lengths = tokens.lengths[correct]  # (answers,)
    if average == "example":
        return mean(nll / lengths, count)
    return nll.sum() / at_least_one(lengths.sum() if count is None else count)


def choice_scores(
    tokens: TokenScores,
    power: float = 1.0,
) -> Tensor:  # shape: (rows,)
    """beta = 1/T^power sum_t log p_t: the score of each choice, its mean log-probability.

    Args:
        power: exponent of the length: 1 for the mean, 0 for the sum.
    """
    return tokens.row_sums(tokens.log_p) / tokens.lengths**power


def choice_loss(
    tokens: TokenScores,
    correct: Tensor,  # shape: (rows,)
    example: Tensor,  # shape: (rows,): rows with the same number are choices of one example
    power: float = 1.0,
    count: Tensor | float | None = None,
) -> Tensor:  # shape: ()
    """L_LN = -log(exp beta_answer / sum_choices exp beta), over scores normalised by length.

    The mean over the examples with at least two choices; 0 if there are none.

    Args:
        power: see `choice_scores`.
        count: the number of such examples in the whole step; None for this batch.
    """
    scores = choice_scores(tokens, power)
    together = example == example.unsqueeze(1)  # shape: (rows, rows)
    z = scores.expand_as(together).masked_fill(~together, -torch.inf).logsumexp(dim=-1)
    ranked = correct & (together.sum(dim=-1) > 1)
    return mean((z - scores)[ranked], count)


def unlikelihood_loss(
    tokens: TokenScores,
    correct: Tensor,  # shape: (rows,)
    example: Tensor,  # shape: (rows,)
    epsilon: float = 0.0,
    average: Averaging = "token",
    count: Tensor | float | None = None,
) -> Tensor:  # shape: ()
    """L_UL = -1/T sum_t log(1 - p_t + epsilon) over the T tokens of the wrong choices; 0 if there are none.

    Ignored tokens add nothing. The paper's code adds log(1 + epsilon) for each of them.

    Args:
        epsilon: 0.01 in the paper's code, where it keeps the loss finite; log space needs none.
        average: "token": the mean over all wrong tokens. "example": the mean over the wrong tokens of each example,
            then over the examples.
        count: the number of tokens (or examples with wrong choices) in the whole step; None for this batch.
    """
    wrong = ~correct[tokens.row]
    row, loss = tokens.row[wrong], -log_add(tokens.log_rest[wrong], epsilon)
    if average == "token":
        return mean(loss, count)
    ids, index = example[row].unique(return_inverse=True)
    sums = loss.new_zeros(len(ids)).index_add(0, index, loss)
    return mean(sums / torch.bincount(index, minlength=len(ids)), count)


def log_add(log_x: Tensor, y: float) -> Tensor:
    """log(x + y), given log x."""
    return log_x if y == 0 else torch.logaddexp(log_x, log_x.new_tensor(y).log())


def mean(values: Tensor, count: Tensor | float | None) -> Tensor:
    """The sum of the values divided by a count, by default their number; 0 for no values."""
    return values.sum() / at_least_one(len(values) if count is None else count)


def at_least_one(count: Tensor | float) -> Tensor | float:
    """The count, or 1 if it is smaller."""
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
