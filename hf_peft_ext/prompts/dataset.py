"""A dataset of prompts: each row is rendered by a randomly drawn template."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hf_peft_ext.prompts.chat import chat
from hf_peft_ext.prompts.template import PromptTemplate
from hf_peft_ext.validation.checks import check


class PromptedDataset(Dataset[dict[str, Any]]):
    """Rows as `prompt`, `choices` and `answer`, each rendered by one of several templates, as in T-Few's training.

    The template of row i depends on `seed`, the epoch and i only. Draws are therefore equal for any number of workers
    and processes, and after a resume. `TFewTrainer` calls `set_epoch`, and so do accelerate's data loader and Trainer
    in a single process. Call it before each epoch of your own loop; otherwise every epoch repeats the first draws.

    Args:
        rows: a list of mappings from field to value, or a `datasets.Dataset`.
        templates: drawn with equal probability.
        seed: of the draws.
        chat: the tokenizer whose chat template formats the prompts; None for plain prompts.
        answer_only: keep only the right choice. T-Few does so for tasks with dozens of labels (Banking77 of RAFT) and
            trains them with the language modelling loss only.

    Raises:
        ValueError: there is no template, or two have the same name.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        templates: Sequence[PromptTemplate],
        seed: int = 0,
        chat: PreTrainedTokenizerBase | None = None,
        answer_only: bool = False,
    ):
        check_templates(templates)
        self.rows, self.templates, self.seed = rows, list(templates), seed
        self.chat, self.answer_only = chat, answer_only
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # shared with persistent workers

    def set_epoch(self, epoch: int) -> None:
        """Use the draws of this epoch from now on."""
        self.epoch.fill_(epoch)

    def template(self, index: int) -> PromptTemplate:
        """The template of the row at `index` in this epoch."""
        draw = random.Random(f"{self.seed} {self.epoch.item()} {index}")
        return draw.choice(self.templates)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` (={index}) must lie within the {len(self)} rows.")
        index %= len(self)
        example = self.template(index).render(self.rows[index])
        if self.chat is not None:
            example["prompt"] = chat(self.chat, example["prompt"])
        if self.answer_only:
            example |= {"choices": [example["choices"][example["answer"]]], "answer": 0}
        return example


def check_templates(templates: Sequence[PromptTemplate]) -> None:
    """Refuse an empty list, and templates with equal names.

    Raises:
        ValueError: there is no template, or two have the same name.
    """
    names = [template.name for template in templates]
    check("templates", names, len(names) > 0, "must hold at least one template")
    check("templates", names, len(set(names)) == len(names), "must have different names")
