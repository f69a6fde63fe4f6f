"""Virtual tokens among embedded tokens."""

from typing import Literal

import torch
from torch import Tensor, nn

PromptPosition = Literal["first", "second"]


class SoftPrompt(nn.Module):
    """[P, x_1, ..., x_T], or [x_1, P, x_2, ..., x_T] in the second position; P: (n_tokens, d).

    Prompt tuning, Lester et al. 2021 (https://arxiv.org/abs/2104.08691), behind the embeddings as in AdapterHub's
    library: P has no position and does not pass the norm of the embeddings, unlike peft's `PROMPT_TUNING`. So the
    sequence is n_tokens longer in all later layers and in the output. No P gives the base model; it starts uniform
    in [-0.5, 0.5], as in the paper.

    Args:
        num_virtual_tokens: n_tokens.
        d: width of an embedded token.
        position: whether P precedes the first token or the second one, behind a BOS or CLS token.
    """

    gate = None

    def __init__(self, num_virtual_tokens: int, d: int, position: PromptPosition = "first"):
        super().__init__()
        self.P = nn.Parameter(torch.empty(num_virtual_tokens, d).uniform_(-0.5, 0.5))
        self.in_front = int(position == "second")  # number of tokens in front of P

    def add(
        self,
        y: Tensor,  # shape: (batch, length, d)
        x: Tensor,  # shape: (batch, length, d), the same
        token_mask: Tensor | None = None,  # shape: (batch, length)
    ) -> Tensor:  # shape: (batch, length + n_tokens, d)
        """The tokens with P among them."""
        p = self.P.to(y.dtype).expand(len(y), -1, -1)  # (batch, n_tokens, d)
        return torch.cat([y[:, : self.in_front], p, y[:, self.in_front :]], dim=1)
