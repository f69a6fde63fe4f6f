"""The tasks a recipe can train: which model, data, trainer and metrics belong to each `task_type`."""

from dataclasses import dataclass, field
from typing import Any

import transformers

from .. import trainers
from ..metrics import CLASSIFICATION, GENERATION, Metric
from .data import Classification, Instruction, Sequences
from .draft import optional
from .rows import Rows


@dataclass(frozen=True)
class Task:
    """What a `task_type` of peft means for a recipe.

    Args:
        model: transformers' auto class.
        data: what the `data` section becomes.
        arguments: what the `training` section becomes: a class of transformers or of TRL, by name.
        trainer_name: its trainer in `hf_peft_ext.trainers`.
        metrics: the metrics that can be asked for, beside the loss.
    """

    model: Any
    data: type[Rows]
    arguments: str
    trainer_name: str
    metrics: dict[str, Metric] = field(default_factory=dict)

    def training(self) -> Any:
        """The class of the `training` section."""
        return getattr(optional("trl", "trl") if self.arguments == "SFTConfig" else transformers, self.arguments)

    def trainer(self) -> Any:
        """The trainer; imported late, since TRL is an extra."""
        return getattr(trainers, self.trainer_name)


TASKS = {
    "SEQ_CLS": Task(
        transformers.AutoModelForSequenceClassification,
        Classification,
        "TrainingArguments",
        "AdapterTrainer",
        CLASSIFICATION,
    ),
    "CAUSAL_LM": Task(transformers.AutoModelForCausalLM, Instruction, "SFTConfig", "AdapterSFTTrainer"),
    "SEQ_2_SEQ_LM": Task(
        transformers.AutoModelForSeq2SeqLM,
        Sequences,
        "Seq2SeqTrainingArguments",
        "AdapterSeq2SeqTrainer",
        GENERATION,
    ),
}
