"""Prompts and their answer choices as tokens, and as one batch of tensors.

A batch holds each prompt once, however many choices it has:

    prompt_ids   (examples, length): padded on either side
    prompt_mask  (examples, length): 0 at padding
    choice_ids   (rows, length): a row for each choice of each example, -100 behind its last token
    example      (rows,): the example that a choice belongs to

`packing.choice_token_scores` turns it into what the losses read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.validation.checks import check


class Example(NamedTuple):
    """The tokens of a prompt, and of each of its choices."""

    prompt: list[int]
    choices: list[list[int]]

    def part(self, start: int, stop: int) -> "Example":
        """The same prompt with some of the choices."""
        return Example(self.prompt, self.choices[start:stop])


def encode_choices(
    tokenizer: Any,
    prompt: str,
    choices: Sequence[str],
    encoder_decoder: bool = False,
    separator: str = " ",
) -> Example:
    """Prompt and choices as tokens, with the boundary where lm-evaluation-harness has it.

    A decoder reads them as one text. White space at the end of the prompt goes to the choices, since words are tokens
    with the space before them; prompt and choice are tokenised together, and what is behind the prompt's own tokens is
    the choice. An empty prompt is the token that begins a text (or else the one that ends it). For an encoder-decoder
    both are texts of their own, with their special tokens: that which ends a choice counts as one of its tokens, as in
    T-Few.

    Line breaks with which a chat template opens the model's turn stay with the prompt. In lm-evaluation-harness they
    go to the choices too: all of them are a token longer there, and as much less probable.

    Args:
        tokenizer: the model's.
        prompt: a text.
        choices: texts.
        encoder_decoder: whether the model is one.
        separator: goes between prompt and choice where neither has white space there; decoders only.

    Raises:
        ValueError: there is no choice, or one without tokens.
    """
    check("choices", choices, len(choices) > 0 and not isinstance(choices, str), "must be a list of at least one text")
    if encoder_decoder:
        encoded = [tokenizer(text_target=choice)["input_ids"] for choice in choices]
        example = Example(tokenizer(prompt)["input_ids"], encoded)
    else:
        context = prompt if opens_turn(tokenizer, prompt) else prompt.rstrip()
        gap = "" if prompt[-1:].isspace() else separator
        gaps = ["" if choice[:1].isspace() else gap for choice in choices]
        targets = [prompt[len(context) :] + gap + choice for gap, choice in zip(gaps, choices, strict=True)]
        ids = open_ids(tokenizer, context)
        encoded = [open_ids(tokenizer, context + target)[len(ids) :] for target in targets]
        example = Example(ids or first_ids(tokenizer), encoded)
    for choice, tokens in zip(choices, example.choices, strict=True):
        check("choices", choice, len(tokens) > 0, "has no tokens behind its prompt")
    return example


def opens_turn(tokenizer: Any, prompt: str) -> bool:
    """Whether the prompt ends with the head of a turn in a chat: a line that begins with a special token."""
    if prompt[-1:] != "\n":
        return False
    head = prompt.rstrip().rpartition("\n")[2]
    return head.startswith(tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special))


def open_ids(tokenizer: Any, text: str) -> list[int]:
    """A text that may go on: with the token that begins it, once, and without one that ends it."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not begun)["input_ids"]
    ends = not begun and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    return ids[:-1] if ends else ids


def first_ids(tokenizer: Any) -> list[int]:
    """What stands for an empty prompt."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    check("tokenizer", type(tokenizer).__name__, first is not None, "has no token to begin an empty prompt with")
    return [first]


def collate(examples: Sequence[Example], pad_token_id: int = 0) -> dict[str, Tensor]:
    """A batch of examples, each with any number of choices."""
    prompts = [torch.tensor(example.prompt) for example in examples]
    choices = [torch.tensor(choice) for example in examples for choice in example.choices]
    counts = torch.tensor([len(example.choices) for example in examples])
    return {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_value=pad_token_id),
        "prompt_mask": pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True),
        "choice_ids": pad_sequence(choices, batch_first=True, padding_value=IGNORED),
        "example": torch.arange(len(examples)).repeat_interleave(counts),
    }
