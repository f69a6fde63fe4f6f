"""Rows of data as prompts, through a template drawn at random for each."""

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
    """Rows as `prompt`, `choices` and `answer`, each through one of several templates, as T-Few trains.

    The template of row i in an epoch is drawn from `seed`, the epoch and i alone. So the draws are the same with any
    number of DataLoader workers and processes, and a run that is resumed goes on with those it would have had.
    `TFewTrainer` calls `set_epoch`, and so does accelerate's data loader, and with it Trainer, in a single process; in
    a loop of your own call it before each epoch, or every epoch has the draws of the first.

    Args:
        rows: mappings, by their fields: a list, or a `datasets.Dataset`.
        templates: to draw from, all alike probable. One for a row that is always asked in the same way.
        seed: of the draws.
        chat: the tokenizer whose chat template the prompts go through; None for prompts as they are.
        answer_only: the right choice is the only one. T-Few trains tasks with dozens of labels (Banking77 of RAFT) so:
            what is left of its losses is the language modelling loss.

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
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that outlive an epoch see it too

    def set_epoch(self, epoch: int) -> None:
        """From here on, the draws are those of this epoch."""
        self.epoch.fill_(epoch)

    def template(self, index: int) -> PromptTemplate:
        """What the row at `index` goes through in this epoch."""
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
    """Refuse an empty list of templates, or two of the same name.

    Raises:
        ValueError: `templates` is empty or repeats a name.
    """
    names = [template.name for template in templates]
    check("templates", names, len(names) > 0, "must hold at least one template")
    check("templates", names, len(set(names)) == len(names), "must each have a name of its own")
