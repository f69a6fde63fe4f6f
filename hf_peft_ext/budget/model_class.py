"""The class of a model for a task, from its config."""

from typing import Any

from peft import PeftConfig
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from hf_peft_ext.validation.checks import check

HEAD_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}


def head_task(config: PreTrainedConfig, peft_config: PeftConfig | None = None, encoder_task: str = "SEQ_CLS") -> str:
    """The task that the adapter names; else generation if the model is made for it; else the encoder's task.

    Args:
        config: the model's config. A model that can be an encoder too generates if its `architectures` says so.
        peft_config: the adapter's config; None for none.
        encoder_task: the task of an encoder.
    """
    named = str(getattr(peft_config, "task_type", None) or "").removeprefix("TaskType.")
    if named in HEAD_CLASSES and (named != "FEATURE_EXTRACTION" or encoder_task == named):
        return named
    if config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return encoder_task
    architectures = getattr(config, "architectures", None) or [""]
    generator: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    is_named = architectures[0] == generator.__name__
    return "CAUSAL_LM" if is_named or type(config) not in MODEL_FOR_MASKED_LM_MAPPING else encoder_task


def model_class(config: PreTrainedConfig, task: str, name: str) -> Any:
    """The class of a model for a task.

    Args:
        config: the model's config.
        task: a name of `HEAD_CLASSES`.
        name: the field, for errors.

    Raises:
        ValueError: there is no such task, or transformers has no class for it.
    """
    check("task", task, task in HEAD_CLASSES, f"must be one of {', '.join(HEAD_CLASSES)}")
    auto = HEAD_CLASSES[task]
    if type(config) not in auto._model_mapping:
        rule = f"must have a class for `{auto.__name__}`; name another task"
        raise ValueError(f"`{name}` (={type(config).__name__}) {rule}.")
    named = auto._model_mapping[type(config)]
    return named[0] if isinstance(named, tuple) else named
