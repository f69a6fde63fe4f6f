"""The losses of T-Few: logits in, scalars out.

T-Few (Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.2) trains a model to rank answer choices. Each
choice of each example is a row of logits and labels; `example` says which rows belong together, so that examples may
have different numbers of choices, and `correct` says which row is the answer:

    tokens = token_scores(logits, labels)
    loss = (
        lm_loss(tokens, correct)
        + choice_loss(tokens, correct, example)
        + unlikelihood_loss(tokens, correct, example)
    )

Everything is computed in float32 and in log space. Every loss is a sum over a count; where the micro-batches of one
step, or several processes, share a mean, pass its whole `count`, and the parts add up to the loss of one big batch.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_peft_ext.validation.checks import check

IGNORED = -100  # the label of tokens that do not count, as everywhere in transformers

Averaging = Literal["token", "example"]


class TokenScores(NamedTuple):
    """What the losses need to know of each token that counts, row by row.

    Args:
        log_p: log p of the label, shape (tokens,).
        log_rest: log(1 - p), the probability of all other tokens, shape (tokens,).
        row: the row of each token, shape (tokens,).
        rows: how many rows there are.
    """

    log_p: Tensor
    log_rest: Tensor
    row: Tensor
    rows: int

    @property
    def lengths(self) -> Tensor:  # shape: (rows,)
        return torch.bincount(self.row, minlength=self.rows)

    def row_sums(self, value: Tensor) -> Tensor:  # shape: (rows,)
        return value.new_zeros(self.rows).index_add(0, self.row, value)


def token_scores(
    logits: Tensor,  # shape: (rows, length, vocab): at each place, those that predict the label there
    labels: Tensor,  # shape: (rows, length): -100 at tokens that do not count
) -> TokenScores:
    """The log-probabilities of the labels, and of everything else.

    log(1 - p) is log sum_{j != label} exp(l_j) - log sum_j exp(l_j), which stays exact where p is nearly 1 and
    1 - exp(log p) would be 0.

    Raises:
        ValueError: the shapes do not agree, or a row has no token that counts.
    """
    rule = f"must have the shape of `logits` without the vocabulary, {tuple(logits.shape[:-1])}"
    check("labels", tuple(labels.shape), labels.shape == logits.shape[:-1], rule)
    counts = labels != IGNORED
    empty = (~counts.any(dim=1)).nonzero()[:, 0].tolist()
    check("labels", empty, not empty, f"has rows without a token that counts, all {IGNORED}")
    scores, label = logits[counts].float(), labels[counts].unsqueeze(1)
    z = scores.logsumexp(dim=-1)
    log_p = scores.gather(1, label).squeeze(1) - z
    log_rest = scores.scatter(1, label, -torch.inf).logsumexp(dim=-1) - z
    return TokenScores(log_p, log_rest, counts.nonzero()[:, 0], len(labels))


def lm_loss(
    tokens: TokenScores,
    correct: Tensor,  # shape: (rows,): whether a row is the answer
    average: Averaging = "token",
    count: Tensor | float | None = None,
) -> Tensor:  # shape: ()
    """L_LM = -1/T sum_t log p_t over the tokens of the right choices.

    Args:
        average: "token", over all T tokens as in the code of the paper; "example", over the tokens of each answer and
            then over the answers. With one example a batch they are the same.
        count: the number of tokens (or answers) of the whole step; None for those in this batch.
    """
    nll = -tokens.row_sums(tokens.log_p)[correct]
    lengths = tokens.lengths[correct]
    if average == "example":
        return mean(nll / lengths, count)
    return nll.sum() / at_least_one(lengths.sum() if count is None else count)


def choice_scores(
    tokens: TokenScores,
    power: float = 1.0,
) -> Tensor:  # shape: (rows,)
    """beta = 1/T^power sum_t log p_t: the score of each choice, its mean log-probability.

    Args:
        power: of the length that divides: 1 for the mean, 0 for the sum.
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
        count: the number of such examples of the whole step; None for those in this batch.
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
    """L_UL = -1/T sum_t log(1 - p_t + epsilon) over the tokens of the wrong choices.

    0 if there are none. Tokens that do not count add nothing; the code of the paper adds log(1 + epsilon) for each.

    Args:
        epsilon: 0.01 in the code of the paper, which needs it to stay finite; not needed here.
        average: "token", over all wrong tokens; "example", over the wrong tokens of each example first.
        count: the number of tokens (or examples with wrong choices) of the whole step; None for those in this batch.
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
    """Their sum over a count; 0 for no values."""
    return values.sum() / at_least_one(len(values) if count is None else count)


def at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
