"""Rows with prompts, answer choices and answers: validated one by one, and collated into batches."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.utils import logging

from hf_peft_ext.ranking.classifier import Normalization, lengths
from hf_peft_ext.ranking.encode import Example, collate, encode_choices
from hf_peft_ext.validation.checks import check

logger: Any = logging.get_logger(__name__)

ROW_FIELDS = ["prompt", "choices", "answer"]


class ChoiceRows(Dataset[dict[str, Any]]):
    """The rows of a map-style dataset. Each is validated at every access, since it may be drawn at random.

    Args:
        rows: a list, a `datasets.Dataset` or a `torch.utils.data.Dataset`. Columns other than `prompt`, `choices` and
            `answer` are dropped.
        answered: whether every row must have an answer. None: all must if the first row has one; otherwise the answers
            of all rows are dropped.

    Raises:
        TypeError: `rows` is not map-style; a row or a field is of the wrong kind.
        ValueError: a field of a row is missing or invalid.
    """

    def __init__(self, rows: Any, answered: bool | None = True):
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(rows, Mapping | str):
            rule = "must be map-style: with a length, its rows read by their numbers"
            raise TypeError(f"The data set (={type(rows).__name__}) {rule}.")
        if answered is None:
            answered = len(rows) > 0 and "answer" in validated(rows[0], 0, answered=False)
        self.rows, self.answered = rows, answered

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = validated(self.rows[number], number, self.answered)
        return row if self.answered else {name: row[name] for name in ROW_FIELDS[:2]}


def validated(row: Any, number: int, answered: bool = True) -> dict[str, Any]:
    """The prompt, the choices and, if it has one, the answer of a row.

    Args:
        row: a mapping with `prompt` (a text), `choices` (a list of texts) and `answer` (the index of a choice).
        number: of the row, for errors.
        answered: whether the answer is required.

    Raises:
        TypeError: the row or a field is of the wrong kind.
        ValueError: a field is missing or invalid.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"Row {number} (={type(row).__name__}) must be a mapping with {', '.join(ROW_FIELDS)}.")
    needed = ROW_FIELDS if answered else ROW_FIELDS[:2]
    lacking = [name for name in needed if row.get(name) is None]
    check("row", number, not lacking, f"lacks {' and '.join(f'`{name}`' for name in lacking)}")
    prompt, choices, answer = (row.get(name) for name in ROW_FIELDS)
    if not isinstance(prompt, str):
        raise TypeError(f"`prompt` (={prompt!r}) of row {number} must be a text.")
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise TypeError(f"`choices` (={choices!r}) of row {number} must be a list of texts.")
    texts = [choice for choice in choices if isinstance(choice, str) and choice.strip()]
    rule = f"of row {number} must be texts, at least one, and none of them empty"
    check("choices", choices, 0 < len(texts) == len(choices), rule)
    fields: dict[str, Any] = {"prompt": prompt, "choices": texts}
    if answer is None:
        return fields
    if isinstance(answer, bool) or not hasattr(answer, "__index__"):
        raise TypeError(f"`answer` (={answer!r}) of row {number} must be the index of a choice, a whole number.")
    index = operator.index(answer)
    rule = f"of row {number} must be the index of one of its {len(texts)} choices, 0 to {len(texts) - 1}"
    check("answer", index, 0 <= index < len(texts), rule)
    return {**fields, "answer": index}


def check_choice_rows(rows: Any) -> None:
    """Validate all rows before training, unless they are generated lazily.

    Raises:
        TypeError, ValueError: see `ChoiceRows`.
    """
    if rows is None:
        return
    validated_rows = ChoiceRows(rows)
    of_datasets = hasattr(rows, "features") and hasattr(rows, "set_transform")
    if isinstance(rows, list | tuple) or (of_datasets and rows.format["type"] != "custom"):  # a transform is lazy
        for number in range(len(validated_rows)):
            validated_rows[number]


@dataclass
class DataCollatorForChoices:
    """Collates rows with prompts, choices and answers into a batch for the model and the losses.

    A batch has the tensors of `ranking.encode.collate`, and

        answer    (examples,): the index of the right choice of each example; absent if no row has an answer
        lengths   (rows,): the divisor of a choice's log-probability in ranking

    Args:
        tokenizer: the model's.
        encoder_decoder: whether the model is an encoder-decoder.
        max_prompt_length: tokens of a prompt. Longer prompts lose their beginning, since most end with the question
            (the code of the paper cuts the end). None for no limit.
        max_choice_length: tokens of a choice; longer ones lose their end. None for no limit.
        normalization: the unit of `lengths`: "token", "byte" or "character"; "none" for 1.
        separator: goes between prompt and choice if neither has white space there; decoders only.
    """

    tokenizer: Any
    encoder_decoder: bool = False
    max_prompt_length: int | None = None
    max_choice_length: int | None = None
    normalization: Normalization = "token"
    separator: str = " "

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        examples = [self.encode(row["prompt"], row["choices"]) for row in rows]
        batch = collate(examples, self.tokenizer.pad_token_id or 0)
        divisors = (lengths(e, row["choices"], self.normalization) for e, row in zip(examples, rows, strict=True))
        batch["lengths"] = torch.tensor([float(n) for one in divisors for n in one])
        if any("answer" in row for row in rows):
            batch["answer"] = torch.tensor([row["answer"] for row in rows])
        return batch

    def encode(self, prompt: str, choices: Sequence[str]) -> Example:
        """The tokens of a prompt and its choices, cut to the maximum lengths."""
        example = encode_choices(self.tokenizer, prompt, choices, self.encoder_decoder, self.separator)
        start = example.prompt[:1] if example.prompt[0] == self.tokenizer.bos_token_id else []
        kept = shorter("prompt", example.prompt[len(start) :], self.max_prompt_length, len(start))
        cut = [shorter("choice", choice[::-1], self.max_choice_length)[::-1] for choice in example.choices]
        return Example(start + kept, cut)


def shorter(name: str, tokens: list[int], length: int | None, taken: int = 0) -> list[int]:
    """The last `length` - `taken` tokens; None for no limit."""
    if length is None or len(tokens) + taken <= length:
        return tokens
    logger.warning_once(f"A {name} has more than `max_{name}_length` (={length}) tokens; such are cut.")
    return tokens[len(tokens) - max(length - taken, 0) :]
