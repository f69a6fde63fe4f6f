"""The rows that a LoRA is distilled and measured on: from texts or tokens to batches, and which predictions count."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.transfer.run.task import Row
from hf_peft_ext.validation.checks import check

Text = str | Sequence[str]  # a text, or a pair of texts
READ_FIELDS = ("input_ids", "attention_mask", "token_type_ids", "labels")


class Inputs:
    """Rows of tokens, and their batches.

    Args:
        tokenizer: the model's.
        writes_answers: whether the model is an encoder-decoder whose labels are what its decoder reads.
        device: of the batches.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, writes_answers: bool, device: torch.device):
        self.tokenizer, self.writes_answers, self.device = tokenizer, writes_answers, device

    def encode(self, data: Sequence[Text | Row], max_length: int | None) -> list[dict[str, Any]]:
        """Rows of tokens: texts and pairs of texts are tokenized, rows of tokens keep what a model reads.

        Raises:
            ValueError: a row is neither.
        """
        tokenizer: Any = self.tokenizer
        rows: list[dict[str, Any]] = []
        for item in data:
            if isinstance(item, Mapping):
                check("rows", sorted(item), "input_ids" in item, "must be texts, or have `input_ids`")
                rows.append({name: listed_value(item[name]) for name in READ_FIELDS if name in item})
            else:
                texts = [item] if isinstance(item, str) else list(item)
                rows.append(dict(tokenizer(*texts, truncation=max_length is not None, max_length=max_length)))
        return rows

    def collate(self, rows: Sequence[Row], labelled: bool = False) -> dict[str, Tensor]:
        """A batch. A decoder's labels are always a part of it, others if `labelled`."""
        keep = labelled or self.writes_answers
        rows = [{name: value for name, value in row.items() if keep or name != "labels"} for row in rows]
        lists = isinstance(rows[0].get("labels"), list)
        collator: Any = DataCollatorForSeq2Seq if lists else DataCollatorWithPadding
        batch = collator(self.tokenizer, return_tensors="pt")([dict(row) for row in rows])
        return {name: value.to(self.device) for name, value in batch.items()}

    def batches(self, rows: Sequence[Row], size: int, labelled: bool = False) -> Iterator[dict[str, Tensor]]:
        """The rows in their order."""
        for first in range(0, len(rows), size):
            yield self.collate(rows[first : first + size], labelled)

    @torch.no_grad()
    def with_answers(self, model: Any, rows: list[dict[str, Any]], size: int, max_new_tokens: int) -> None:
        """Give each row without labels those that an encoder-decoder generates for it, in place.

        So the student learns on what the teacher would write: sequence-level distillation, Kim and Rush 2016
        (https://arxiv.org/abs/1606.07947).
        """
        lacking = [row for row in rows if "labels" not in row]
        for first in range(0, len(lacking), size):
            part = lacking[first : first + size]
            ids = model.generate(**self.collate(part), max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            for row, answer in zip(part, ids[:, 1:].tolist(), strict=True):  # without the start token
                tokens = [token for token in answer if token != self.tokenizer.pad_token_id]
                row["labels"] = tokens or [self.tokenizer.eos_token_id]


def listed_value(value: Any) -> Any:
    """A tensor or array as lists, as collators pad them."""
    return value.tolist() if hasattr(value, "tolist") else value


def predictions_that_count(
    logits: Tensor,  # shape: (batch, classes) or (batch, length, classes)
    batch: Mapping[str, Tensor],
    writes_answers: bool,
) -> Tensor:  # shape: (batch,) or (batch, length)
    """Which predictions are compared: one a row of a classifier, else those of tokens that are no padding."""
    if logits.ndim == 2:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if writes_answers and "labels" in batch:
        return batch["labels"] != IGNORED
    mask = batch.get("attention_mask")
    return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask.bool()


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of a batch, in float32."""
    return model(**batch).logits.float()
