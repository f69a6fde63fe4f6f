"""What the head of a transformers model computes, in the terms of AdapterHub's flexible heads."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

# the library's type of a head -> the class of transformers whose models have it
HEAD_AUTO_CLASSES: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "multilabel_classification": AutoModelForSequenceClassification,
    "tagging": AutoModelForTokenClassification,
    "multiple_choice": AutoModelForMultipleChoice,
    "question_answering": AutoModelForQuestionAnswering,
    "image_classification": AutoModelForImageClassification,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
}
OF_LABELS = ("classification", "multilabel_classification", "tagging", "image_classification")
OF_LANGUAGE = ("masked_lm", "causal_lm", "seq2seq_lm")
GELU_HEADS = ("electra", "roberta", "xlm-roberta")  # their heads ignore `hidden_act`
STACKS = ("encoder", "decoder", "shared")  # T5 with a head has no module around its stacks


class UnsupportedHead(Exception):
    """A saved head cannot be imported; the message says why."""


@dataclass
class HeadForm:
    """The layers of a model's head.

    Args:
        layers: their paths in the order of a forward pass.
        activation: between two linear layers; None with a single one.
        pooled: whether the head reads the pooled output of the backbone.
    """

    layers: list[str]
    activation: str | None = None
    pooled: bool = False


def backbone_names(model: Any) -> tuple[str, ...]:
    """The children of a model that do not belong to its head."""
    return (model.base_model_prefix, *STACKS)


def is_of_kind(model: nn.Module, kind: str) -> bool:
    """Whether a model has a head for this task."""
    config: Any = model.config
    named = HEAD_AUTO_CLASSES[kind]._model_mapping.get(type(config), ())
    return isinstance(model, named)


def head_form(model: nn.Module, kind: str, settings: dict[str, Any]) -> HeadForm:
    """The form of a model's head for a task.

    Args:
        model: a model with a head for `kind`.
        kind: a name of `HEAD_AUTO_CLASSES`.
        settings: of the saved head; `use_pooler` says whether it reads the pooled output.

    Raises:
        UnsupportedHead: the head needs a pooled output that the model does not have.
    """
    if kind in OF_LANGUAGE:
        return language_form(model)
    if kind == "question_answering":
        return HeadForm(["qa_outputs"])
    if kind == "tagging":
        return HeadForm(["classifier" if hasattr(model, "classifier") else "score"])
    form = classifier_form(model)
    if not settings.get("use_pooler"):
        return form
    if not form.pooled:
        raise UnsupportedHead(f"it reads the pooled output (`use_pooler`), which {type(model).__name__} lacks")
    return HeadForm(form.layers[-1:], pooled=True)


def classifier_form(model: Any) -> HeadForm:
    """The form of a head with one output a sequence, an image or a choice; its first layer may be the pooler's."""
    config, prefix = model.config, model.base_model_prefix
    pooler = getattr(getattr(model, prefix, None), "pooler", None)
    forms = [
        ("classifier.dense", "classifier.out_proj", "gelu" if config.model_type == "electra" else "tanh"),
        ("classification_head.dense", "classification_head.out_proj", "tanh"),
        ("pre_classifier", "classifier", "relu"),  # DistilBERT
        ("pooler.dense", "classifier", getattr(config, "pooler_hidden_act", None)),  # DeBERTa
        ("sequence_summary.summary", "classifier", getattr(config, "summary_activation", None)),  # ELECTRA
        (f"{prefix}.pooler.dense", "classifier", "tanh"),  # BERT
        (f"{prefix}.pooler", "classifier", "tanh"),  # ALBERT
    ]
    modules = dict(model.named_modules())
    for dense, out, activation in forms:
        if isinstance(modules.get(dense), nn.Linear) and out in modules:
            return HeadForm([dense, out], activation, pooled=pooler is not None)
    return HeadForm(["classifier" if "classifier" in modules else "score"], pooled=pooler is not None)


def language_form(model: Any) -> HeadForm:
    """The form of a head over the vocabulary: dense, activation and norm may precede the output embeddings.

    Raises:
        UnsupportedHead: the model has no output embeddings.
    """
    output, outside = model.get_output_embeddings(), backbone_names(model)
    paths = {
        path: module
        for path, module in model.named_modules()
        if path.partition(".")[0] not in outside and isinstance(module, (nn.Linear, nn.LayerNorm))
    }
    last = next((path for path, module in paths.items() if module is output), None)
    if last is None:
        raise UnsupportedHead(f"{type(model).__name__} has no layer over its vocabulary")
    others = [path for path, module in paths.items() if module is not output]
    others.sort(key=lambda path: isinstance(paths[path], nn.LayerNorm))
    config = model.config
    usual = getattr(config, "hidden_act", None) or getattr(config, "activation", None)
    activation = "gelu" if config.model_type in GELU_HEADS else usual
    return HeadForm([*others, last], activation if others else None)
