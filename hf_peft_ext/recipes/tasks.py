"""The tasks of recipes: model class, data, trainer and metrics of each `task_type`.

A language model with `data.choices` learns to rank the choices: T-Few's task.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_peft_ext import trainers
from hf_peft_ext.ranking.metrics import CLASSIFICATION, GENERATION, Metric
from hf_peft_ext.recipes.data import Classification, Instruction, Ranking, Sequences
from hf_peft_ext.recipes.dataset_config import Rows
from hf_peft_ext.recipes.recipe_source import optional
from hf_peft_ext.tuners.ia3.config import TFewConfig


@dataclass(frozen=True)
class Task:
    """A `task_type` of peft in a recipe.

    Args:
        model: transformers' auto class.
        data: class of the `data` section.
        arguments: name of the class of the `training` section, from transformers, TRL or `hf_peft_ext.trainers`.
        trainer_name: name of the trainer in `hf_peft_ext.trainers`.
        metrics: the available metrics, besides the loss.
    """

    model: Any
    data: type[Rows]
    arguments: str
    trainer_name: str
    metrics: dict[str, Metric] = field(default_factory=dict)

    def training(self) -> Any:
        """The class of the `training` section; imported late, since TRL is an extra."""
        if self.arguments == "SFTConfig":
            return optional("trl", "trl").SFTConfig
        return getattr(trainers if hasattr(trainers, self.arguments) else transformers, self.arguments)

    def trainer(self) -> Any:
        """The class of the trainer; imported late, since TRL is an extra."""
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
T_FEW = {
    task_type: replace(
        TASKS[task_type],
        data=Ranking,
        arguments="TFewTrainingArguments",
        trainer_name="TFewTrainer",
        metrics=CLASSIFICATION,
    )
    for task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
}
CONFIGS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
CONFIGS["TFEW"] = TFewConfig  # becomes an IA3Config once the model is known


def task_of(task_type: str, data: Mapping[str, Any] | None) -> Task:
    """The task of a recipe.

    Args:
        task_type: its `peft.task_type`.
        data: its `data` section.
    """
    return T_FEW[task_type] if task_type in T_FEW and "choices" in (data or {}) else TASKS[task_type]
