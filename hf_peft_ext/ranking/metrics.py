"""The metrics of recipes and prompt templates, by name. Each compares predictions with labels.

scikit-learn is imported on the first use of a metric, because its import is slow.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

Metric = Callable[[Any, Any], float]


def accuracy(
    predicted: np.ndarray,  # shape: (rows,): class indices
    labels: np.ndarray,  # shape: (rows,)
) -> float:
    """The share of correct rows."""
    return float((predicted == labels).mean())


def f1(
    predicted: np.ndarray,  # shape: (rows,): class indices
    labels: np.ndarray,  # shape: (rows,)
) -> float:
    """The mean over all classes of F1 = 2 TP / (2 TP + FP + FN), "macro" in scikit-learn."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro"))


def matthews_correlation(
    predicted: np.ndarray,  # shape: (rows,): class indices
    labels: np.ndarray,  # shape: (rows,)
) -> float:
    """The correlation of predictions and labels for any number of classes (Gorodkin 2004); 0 if either is constant."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.union1d(predicted, labels)) == 1:  # scikit-learn returns 0 too, with a warning
        return 0.0
    return float(matthews_corrcoef(labels, predicted))


def pearson(
    predicted: np.ndarray,  # shape: (rows,)
    labels: np.ndarray,  # shape: (rows,)
) -> float:
    """Pearson's correlation; 0 if either is constant."""
    return 0.0 if np.ptp(predicted) == 0 or np.ptp(labels) == 0 else float(np.corrcoef(predicted, labels)[0, 1])


def spearmanr(
    predicted: np.ndarray,  # shape: (rows,)
    labels: np.ndarray,  # shape: (rows,)
) -> float:
    """Spearman's correlation, that of the ranks; 0 if either is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(predicted), rankdata(labels))


def exact_match(predicted: Sequence[str], labels: Sequence[str]) -> float:
    """The share of texts that equal their labels, without the white space at both ends."""
    return sum(p.strip() == y.strip() for p, y in zip(predicted, labels, strict=True)) / len(labels)


CLASSIFICATION: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "matthews_correlation": matthews_correlation}
REGRESSION: dict[str, Metric] = {"pearson": pearson, "spearmanr": spearmanr}  # GLUE's names
GENERATION: dict[str, Metric] = {"exact_match": exact_match}


def classification_metrics(metrics: dict[str, Metric]) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a Trainer for classification and regression.

    Predictions are logits of shape (rows, classes), for regression scores of shape (rows,) or (rows, 1).
    """

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        logits = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
        logits, labels = np.asarray(logits), np.asarray(evaluated.label_ids)
        predicted = {True: logits.reshape(-1), False: logits.argmax(-1)}
        return {name: metric(predicted[name in REGRESSION], labels) for name, metric in metrics.items()}

    return compute


def generation_metrics(
    metrics: dict[str, Metric], tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a Trainer for text generation; predictions and labels are token ids (rows, length)."""

    def texts(ids: Any) -> list[str]:
        ids = np.where(np.asarray(ids) >= 0, ids, tokenizer.pad_token_id)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        predicted, labels = texts(evaluated.predictions), texts(evaluated.label_ids)
        return {name: metric(predicted, labels) for name, metric in metrics.items()}

    return compute
