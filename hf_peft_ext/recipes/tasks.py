"""The tasks of recipes: model class, data, trainer and metrics of each `task_type`.

A language model with `data.choices` learns to rank the choices: T-Few's task. `data.problem_type` makes SEQ_CLS a
regression, as transformers has it. FEATURE_EXTRACTION is an embedding model of sentence-transformers; with
`data.score_column` it learns similarities.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_peft_ext import trainers
from hf_peft_ext.model.mean_pooling import MeanPoolingForSequenceClassification
from hf_peft_ext.ranking.metrics import CLASSIFICATION, GENERATION, REGRESSION
from hf_peft_ext.recipes.data import ClassificationData, InstructionData, RankingData, SequenceData
from hf_peft_ext.recipes.dataset_config import DatasetArguments
from hf_peft_ext.recipes.embeddings import PACKAGE_AND_EXTRA, RETRIEVAL, SIMILARITY, EmbeddingData, EmbeddingModel
from hf_peft_ext.recipes.recipe_source import optional
from hf_peft_ext.tuners.ia3.config import TFewConfig


@dataclass(frozen=True)
class RecipeTask:
    """A `task_type` of peft in a recipe.

    Args:
        model: class with `from_pretrained` and `from_config`.
        data: class of the `data` section.
        arguments: name of the class of the `training` section, from transformers, TRL, sentence-transformers or
            `hf_peft_ext.trainers`.
        trainer_name: name of the trainer in `hf_peft_ext.trainers`.
        metrics: the available metrics, besides the loss: name -> its function, or None where the trainer computes it.
    """

    model: Any
    data: type[DatasetArguments]
    arguments: str
    trainer_name: str
    metrics: dict[str, Any] = field(default_factory=dict)

    def training(self) -> Any:
        """The class of the `training` section; imported late, since TRL and sentence-transformers are extras."""
        if self.arguments == "SFTConfig":
            return optional("trl", "trl").SFTConfig
        if self.arguments == "SentenceTransformerTrainingArguments":
            return optional(*PACKAGE_AND_EXTRA).SentenceTransformerTrainingArguments
        return getattr(trainers if hasattr(trainers, self.arguments) else transformers, self.arguments)

    def trainer(self) -> Any:
        """The class of the trainer; imported late, as `training`."""
        return getattr(trainers, self.trainer_name)


RECIPE_TASKS = {
    "SEQ_CLS": RecipeTask(
        transformers.AutoModelForSequenceClassification,
        ClassificationData,
        "TrainingArguments",
        "AdapterTrainer",
        CLASSIFICATION,
    ),
    "CAUSAL_LM": RecipeTask(transformers.AutoModelForCausalLM, InstructionData, "SFTConfig", "AdapterSFTTrainer"),
    "SEQ_2_SEQ_LM": RecipeTask(
        transformers.AutoModelForSeq2SeqLM,
        SequenceData,
        "Seq2SeqTrainingArguments",
        "AdapterSeq2SeqTrainer",
        GENERATION,
    ),
    "FEATURE_EXTRACTION": RecipeTask(
        EmbeddingModel,
        EmbeddingData,
        "SentenceTransformerTrainingArguments",
        "AdapterEmbeddingTrainer",
        RETRIEVAL,
    ),
}
T_FEW = {
    task_type: replace(
        RECIPE_TASKS[task_type],
        data=RankingData,
        arguments="TFewTrainingArguments",
        trainer_name="TFewTrainer",
        metrics=CLASSIFICATION,
    )
    for task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
}
REGRESSION_TASK = replace(RECIPE_TASKS["SEQ_CLS"], metrics=REGRESSION)
SIMILARITY_TASK = replace(RECIPE_TASKS["FEATURE_EXTRACTION"], metrics=SIMILARITY)
CONFIGS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
CONFIGS["TFEW"] = TFewConfig  # becomes an IA3Config once the model is known


def task_of(task_type: str, data: Mapping[str, Any] | None, pooling: str | None = None) -> RecipeTask:
    """The task of a recipe.

    Args:
        task_type: its `peft.task_type`.
        data: its `data` section.
        pooling: its `model.pooling`, for a `task_type` of SEQ_CLS.
    """
    data = data or {}
    if task_type in T_FEW and "choices" in data:
        return T_FEW[task_type]
    if task_type == "FEATURE_EXTRACTION" and data.get("score_column"):
        return SIMILARITY_TASK
    is_regression = task_type == "SEQ_CLS" and data.get("problem_type") == "regression"
    task = REGRESSION_TASK if is_regression else RECIPE_TASKS[task_type]
    return replace(task, model=MeanPoolingForSequenceClassification) if pooling == "mean" else task
