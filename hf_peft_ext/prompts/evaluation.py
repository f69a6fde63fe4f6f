"""Evaluates a model on a task with each prompt template separately."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_peft_ext.prompts.chat import chat as as_chat
from hf_peft_ext.prompts.dataset import check_templates
from hf_peft_ext.prompts.demonstrations import context_length, with_demonstrations
from hf_peft_ext.prompts.template import PromptTemplate
from hf_peft_ext.ranking.classifier import RankClassifier
from hf_peft_ext.ranking.metrics import CLASSIFICATION
from hf_peft_ext.validation.checks import check


@dataclass(frozen=True)
class TemplateScores:
    """The result of `evaluate_templates`.

    Args:
        metric: "accuracy", "f1" or "matthews_correlation".
        scores: name of a template -> its metric.
        predictions: name of a template -> the index of the predicted choice for each row.
        answers: name of a template -> the index of the right choice for each row.
    """

    metric: str
    scores: dict[str, float]
    predictions: dict[str, list[int]]
    answers: dict[str, list[int]]

    @property
    def median(self) -> float:
        """The median over the templates."""
        return float(np.median(list(self.scores.values())))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile over the templates, linearly interpolated."""
        first, third = np.quantile(list(self.scores.values()), [0.25, 0.75])
        return float(first), float(third)

    @property
    def interquartile_range(self) -> float:
        """The third quartile minus the first."""
        first, third = self.quartiles
        return third - first

    def __str__(self) -> str:
        first, third = self.quartiles
        each = ", ".join(f"{name} {score:.3f}" for name, score in self.scores.items())
        return f"{self.metric} {self.median:.3f} ({first:.3f} to {third:.3f}): {each}"


def evaluate_templates(
    classifier: RankClassifier,
    rows: Sequence[Mapping[str, Any]],
    templates: Sequence[PromptTemplate],
    demonstrations: Sequence[Mapping[str, Any]] = (),
    k: int = 0,
    seed: int = 0,
    separator: str = "\n\n",
    chat: bool = False,
    shared: bool = False,
) -> TemplateScores:
    """Evaluate rank classification of all rows with each template, as T-Few does.

    Args:
        classifier: model, tokenizer and normalisation of the scores.
        rows: mappings from field to value.
        templates: of one task.
        demonstrations: rows for in-context learning, rendered by the same template.
        k: demonstrations in each prompt; fewer, with a warning, if the model cannot read them all.
        seed, separator, shared: see `with_demonstrations`.
        chat: whether prompts are formatted by the chat template of the classifier's tokenizer.

    Raises:
        ValueError: there are no rows or no templates, or the templates have different metrics; see also
            `PromptTemplate.render` and `with_demonstrations`.
    """
    check_templates(templates)
    check("rows", len(rows), len(rows) > 0, "must hold at least one row")
    metrics = sorted({template.metric for template in templates})
    check("templates", metrics, len(metrics) == 1, "must be evaluated by the same metric")
    scores, predictions, answers = {}, {}, {}
    for template in templates:
        examples = [template.render(row) for row in rows]
        if k > 0:
            rendered = [template.render(row) for row in demonstrations]
            limit = context_length(classifier.model)
            tokenizer = classifier.tokenizer
            examples = with_demonstrations(examples, rendered, k, seed, tokenizer, limit, separator, chat, shared)
        elif chat:
            examples = [{**one, "prompt": as_chat(classifier.tokenizer, one["prompt"])} for one in examples]
        predictions[template.name] = best_choices(classifier, examples)
        answers[template.name] = [one["answer"] for one in examples]
        predicted, labels = np.array(predictions[template.name]), np.array(answers[template.name])
        scores[template.name] = CLASSIFICATION[metrics[0]](predicted, labels)
    return TemplateScores(metrics[0], scores, predictions, answers)


def best_choices(classifier: RankClassifier, examples: Sequence[Mapping[str, Any]]) -> list[int]:
    """The index of the choice that the model ranks highest, for each example; the first of equals."""
    scores = classifier.scores([one["prompt"] for one in examples], [one["choices"] for one in examples])
    return [score.tolist().index(score.max().item()) for score in scores]
