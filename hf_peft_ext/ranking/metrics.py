"""The metrics of recipes and prompt templates, by name; each compares what was predicted with what is right."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

Metric = Callable[[Any, Any], float]


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of the rows that is right."""
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of each class, and the mean over the classes (macro)."""
    classes = np.union1d(predicted, labels)
    scores = [
        2 * ((predicted == c) & (labels == c)).sum() / ((predicted == c).sum() + (labels == c).sum()) for c in classes
    ]
    return float(np.mean(scores))


def matthews_correlation(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The correlation of predicted and right classes, any number of them (Gorodkin 2004); 0 if one is constant."""
    classes = np.union1d(predicted, labels)
    p, y = (np.asarray(x)[:, None] == classes for x in (predicted, labels))
    p, y = p - p.mean(0), y - y.mean(0)
    norm = np.sqrt((p * p).sum() * (y * y).sum())
    return float((p * y).sum() / norm) if norm else 0.0


def exact_match(predicted: Sequence[str], labels: Sequence[str]) -> float:
    """The share of the texts that are right to the letter, spaces at the ends left out."""
    return sum(p.strip() == y.strip() for p, y in zip(predicted, labels, strict=True)) / len(labels)


CLASSIFICATION: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "matthews_correlation": matthews_correlation}
GENERATION: dict[str, Metric] = {"exact_match": exact_match}


def classification_metrics(metrics: dict[str, Metric]) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a Trainer that classifies."""

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        logits = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
        labels = evaluated.label_ids
        return {name: metric(np.asarray(logits).argmax(-1), np.asarray(labels)) for name, metric in metrics.items()}

    return compute


def generation_metrics(
    metrics: dict[str, Metric], tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a Trainer that generates text."""

    def texts(ids: Any) -> list[str]:
        ids = np.where(np.asarray(ids) >= 0, ids, tokenizer.pad_token_id)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        predicted, labels = texts(evaluated.predictions), texts(evaluated.label_ids)
        return {name: metric(predicted, labels) for name, metric in metrics.items()}

    return compute
