"""How well a model answers a task, asked in the words of each template by itself."""

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
    """What `evaluate_templates` found.

    Args:
        metric: "accuracy", "f1" or "matthews_correlation".
        scores: template -> the metric of its answers.
        predictions: template -> the index of the choice it was answered with, for each row.
        answers: template -> the index of the right choice, for each row.
    """

    metric: str
    scores: dict[str, float]
    predictions: dict[str, list[int]]
    answers: dict[str, list[int]]

    @property
    def median(self) -> float:
        """Median score of the templates."""
        return float(np.median(list(self.scores.values())))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third, with linear interpolation between templates."""
        first, third = np.quantile(list(self.scores.values()), [0.25, 0.75])
        return float(first), float(third)

    @property
    def interquartile_range(self) -> float:
        """Third quartile of the scores minus the first."""
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
    """Rank classification of all rows with each template, reported as T-Few does: median and quartiles over templates.

    Args:
        classifier: model and tokenizer, and how scores are normalised.
        rows: mappings, by their fields.
        templates: of one task.
        demonstrations: rows to draw demonstrations from, for in-context learning; they go through the same template.
        k: how many demonstrations a prompt has; cut down, with a warning, to what the model can read.
        seed, separator, shared: see `with_demonstrations`.
        chat: whether prompts go through the chat template of the classifier's tokenizer.

    Raises:
        ValueError: there are no rows or no templates, or the templates are of different metrics; or as of
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
            shown = [template.render(row) for row in demonstrations]
            limit = context_length(classifier.model)
            tokenizer = classifier.tokenizer
            examples = with_demonstrations(examples, shown, k, seed, tokenizer, limit, separator, chat, shared)
        elif chat:
            examples = [{**one, "prompt": as_chat(classifier.tokenizer, one["prompt"])} for one in examples]
        predictions[template.name] = best_choices(classifier, examples)
        answers[template.name] = [one["answer"] for one in examples]
        found, right = np.array(predictions[template.name]), np.array(answers[template.name])
        scores[template.name] = CLASSIFICATION[metrics[0]](found, right)
    return TemplateScores(metrics[0], scores, predictions, answers)


def best_choices(classifier: RankClassifier, examples: Sequence[Mapping[str, Any]]) -> list[int]:
    """The index of the choice that the model ranks highest, for each example; the first of equals."""
    scores = classifier.scores([one["prompt"] for one in examples], [one["choices"] for one in examples])
    return [score.tolist().index(score.max().item()) for score in scores]
