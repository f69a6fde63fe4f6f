"""Tokenises prompts and their answer choices, and collates them into a batch of tensors.

A batch holds each prompt once for all its choices:

    prompt_ids   (examples, length): padded on either side
    prompt_mask  (examples, length): 0 at padding
    choice_ids   (rows, length): a row for each choice of each example, padded with -100
    example      (rows,): the example of each choice

`packing.choice_token_scores` computes the input of the losses from it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.validation.checks import check


class Example(NamedTuple):
    """Token ids of a prompt and of its choices."""

    prompt: list[int]
    choices: list[list[int]]

    def part(self, start: int, stop: int) -> "Example":
        """The same prompt with the choices from `start` to `stop`, exclusive."""
        return Example(self.prompt, self.choices[start:stop])


def encode_choices(
    tokenizer: Any,
    prompt: str,
    choices: Sequence[str],
    encoder_decoder: bool = False,
    separator: str = " ",
) -> Example:
    """Tokenise a prompt and its choices, with the same boundary as lm-evaluation-harness.

    A decoder reads both as one text. White space at the end of the prompt belongs to the choices, because tokens of
    words include the preceding space. Prompt and choice are tokenised together; the tokens after those of the prompt
    are the choice. An empty prompt is the BOS token, or else the EOS token. For an encoder-decoder both are separate
    texts with their special tokens. The EOS token of a choice counts as one of its tokens, as in T-Few.

    Line breaks after the head of the model's turn in a chat belong to the prompt. In lm-evaluation-harness they belong
    to the choices, which adds a token to each choice and lowers its probability.

    Args:
        tokenizer: the model's.
        prompt: a text.
        choices: texts.
        encoder_decoder: whether the model is an encoder-decoder.
        separator: inserted between prompt and choice if neither has white space there; decoders only.

    Raises:
        ValueError: there is no choice, a choice has no tokens, or an empty prompt has no BOS or EOS token.
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
        check("choices", choice, len(tokens) > 0, "has no tokens after its prompt")
    return example


def opens_turn(tokenizer: Any, prompt: str) -> bool:
    """Whether the prompt ends with the head of a turn in a chat: a line that begins with a special token."""
    if prompt[-1:] != "\n":
        return False
    head = prompt.rstrip().rpartition("\n")[2]
    return head.startswith(tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special))


def open_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that may be continued: with exactly one BOS token and without the EOS token."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not begun)["input_ids"]
    ends = not begun and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    return ids[:-1] if ends else ids


def first_ids(tokenizer: Any) -> list[int]:
    """Token ids of an empty prompt.

    Raises:
        ValueError: the tokenizer has neither a BOS nor an EOS token.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rule = "has neither a BOS nor an EOS token for an empty prompt"
    check("tokenizer", type(tokenizer).__name__, first is not None, rule)
    return [first]


def collate(examples: Sequence[Example], pad_token_id: int = 0) -> dict[str, Tensor]:
    """A batch of examples with any numbers of choices; its tensors are described at the top of this module."""
    prompts = [torch.tensor(example.prompt) for example in examples]
    choices = [torch.tensor(choice) for example in examples for choice in example.choices]
    counts = torch.tensor([len(example.choices) for example in examples])
    return {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_value=pad_token_id),
        "prompt_mask": pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True),
        "choice_ids": pad_sequence(choices, batch_first=True, padding_value=IGNORED),
        "example": torch.arange(len(examples)).repeat_interleave(counts),
    }
