"""Measures what an export lost: how a LoRA answers beside the adapter and the base model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from scipy.stats import binomtest, norm
from torch import Tensor

from hf_peft_ext.export.divergence import PredictionKind, agreement, divergence
from hf_peft_ext.export.inputs import Inputs, logits_of, predictions_that_count
from hf_peft_ext.export.roles import ModelRole, Roles
from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.transfer.run.task import Row

ROLES: tuple[ModelRole, ...] = ("adapter", "lora", "base")
COVERAGE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over rows with its 95 % interval.

    Args:
        value: the mean.
        low, high: the ends: Wilson's for shares, else normal.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """A metric on rows with labels.

    Args:
        metric: its name.
        adapter, lora, base: the three models' means.
        difference: the LoRA's less the adapter's, row by row.
    """

    metric: str
    adapter: Interval
    lora: Interval
    base: Interval
    difference: Interval

    def line(self) -> str:
        """The metric as a line of text."""
        models = (("adapter", self.adapter), ("LoRA", self.lora), ("base", self.base), ("difference", self.difference))
        shown = (f"{name} {of.value:.4g} [{of.low:.4g}, {of.high:.4g}]" for name, of in models)
        return f"{self.metric}: {', '.join(shown)} (95 %)"


@dataclass(frozen=True)
class Fidelity:
    """How close a LoRA is to the adapter, on rows that it was not trained on.

    The base is the base model with the head and other modules that the adapter saves whole.

    Args:
        rows: number of rows.
        kl: KL(adapter || LoRA), mean over predictions.
        kl_base: KL(adapter || base).
        kl_lora_base: KL(base || LoRA).
        agreement: share of predictions that are the adapter's; None for numbers.
        agreement_base: the same of the base.
        scores: metrics, if rows with labels were given.
    """

    rows: int
    kl: float
    kl_base: float
    kl_lora_base: float
    agreement: float | None
    agreement_base: float | None
    scores: list[Score] = field(default_factory=list)

    @property
    def is_closer_to_base(self) -> bool:
        """Whether the LoRA is at least as far from the adapter as from the base."""
        return self.kl >= self.kl_lora_base

    def lines(self) -> list[str]:
        """The numbers as lines of text."""
        agreed = "" if self.agreement is None else f", {self.agreement:.1%} of predictions alike"
        of_base = "" if self.agreement_base is None else f", {self.agreement_base:.1%} alike"
        first = (
            f"KL from the adapter {self.kl:.3g}{agreed} (base: {self.kl_base:.3g}{of_base}), {self.rows} rows held out"
        )
        return [first, *(score.line() for score in self.scores)]


@torch.no_grad()
def fidelity(roles: Roles, inputs: Inputs, rows: Sequence[Row], kind: PredictionKind, batch_size: int) -> Fidelity:
    """Compare the three roles of a model on rows.

    Args:
        roles: an attached model.
        inputs: makes batches.
        rows: rows of tokens; labels are not read but by an encoder-decoder.
        kind: of the predictions.
        batch_size: rows of a batch.
    """
    kl = kl_base = kl_lora_base = 0.0
    alike: list[Tensor] = []  # of each batch, shape: (2, predictions): the LoRA's, and the base's
    count = 0
    for batch in inputs.batches(rows, batch_size):
        adapter, lora, base = compared_predictions(roles, inputs, batch)
        kl += divergence(adapter, lora, kind).double().sum().item()
        kl_base += divergence(adapter, base, kind).double().sum().item()
        kl_lora_base += divergence(base, lora, kind).double().sum().item()
        agreed = [agreement(adapter, other, kind) for other in (lora, base)]
        alike += [torch.stack([a for a in agreed if a is not None])] if agreed[0] is not None else []
        count += len(adapter)
    shares: Any = torch.cat(alike, dim=1).double().mean(1).tolist() if alike else (None, None)
    n = max(1, count)
    return Fidelity(len(rows), kl / n, kl_base / n, kl_lora_base / n, *shares)


def compared_predictions(roles: Roles, inputs: Inputs, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The predictions that count, of the adapter, the LoRA and the base; shape of each: (predictions, classes)."""
    logits = []
    for role in ROLES:
        roles.use(role)
        logits.append(logits_of(roles.model, batch))
    counts = predictions_that_count(logits[0], batch, inputs.writes_answers)
    return [values[counts] for values in logits]


@torch.no_grad()
def score(roles: Roles, inputs: Inputs, rows: Sequence[Row], kind: PredictionKind, batch_size: int) -> list[Score]:
    """The task's metrics of the three roles, on rows with labels.

    Accuracy for classes, and for labels each row that is right in all of them; the squared error for numbers; the loss
    of each row's tokens and the share of tokens that are predicted for language models.
    """
    values: dict[str, dict[ModelRole, list[float]]] = {}
    for batch in inputs.batches(rows, batch_size, labelled=True):
        labels = batch["labels"]
        unlabelled = batch if inputs.writes_answers else {k: v for k, v in batch.items() if k != "labels"}
        for role in ROLES:
            roles.use(role)
            logits = logits_of(roles.model, unlabelled)
            for metric, of_rows in row_scores(logits, labels, kind, inputs.writes_answers).items():
                values.setdefault(metric, {}).setdefault(role, []).extend(of_rows.tolist())
    return [
        Score(
            metric,
            *(interval(of[role]) for role in ROLES),
            difference=difference(of["lora"], of["adapter"]),
        )
        for metric, of in values.items()
    ]


def row_scores(logits: Tensor, labels: Tensor, kind: PredictionKind, writes_answers: bool) -> dict[str, Tensor]:
    """Metric -> its value for each row of a batch, shape: (batch,)."""
    if logits.ndim == 3:
        if not writes_answers:
            logits, labels = logits[:, :-1], labels[:, 1:]
        counts = labels != IGNORED  # (batch, length)
        n = counts.sum(1).clamp_min(1)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        right = (logits.argmax(-1) == labels) & counts
        return {"loss": losses.sum(1) / n, "token accuracy": right.sum(1) / n}
    if kind == "numbers":
        return {"squared error": (logits.squeeze(-1) - labels.float().view(len(logits), -1).squeeze(-1)).square()}
    if kind == "labels":
        return {"accuracy": ((logits > 0) == labels.bool()).all(-1).float()}
    return {"accuracy": (logits.argmax(-1) == labels).float()}


def interval(values: Sequence[float]) -> Interval:
    """The mean of values with its 95 % interval: Wilson's if all are 0 or 1, else normal."""
    n, mean = len(values), sum(values) / len(values)
    if all(value in (0.0, 1.0) for value in values):
        ends: Any = binomtest(round(sum(values)), n).proportion_ci(COVERAGE, method="wilson")
        return Interval(mean, float(ends.low), float(ends.high))
    return around(mean, mean, sqrt(sum((value - mean) ** 2 for value in values) / max(1, n - 1) / n))


def difference(new: Sequence[float], old: Sequence[float]) -> Interval:
    """The mean of new - old, row by row, with its 95 % interval.

    For rows that are right or wrong it is that of Agresti and Min 2005 (https://doi.org/10.1002/sim.1781), which adds
    half a row to each of the four cells: rows that all agree leave an interval that is not empty.
    """
    values = [a - b for a, b in zip(new, old, strict=True)]
    mean = sum(values) / len(values)
    if not {*new, *old} <= {0.0, 1.0}:
        return interval(values) if any(values) else Interval(0.0, 0.0, 0.0)
    n, better, worse = len(values) + 2, values.count(1.0) + 0.5, values.count(-1.0) + 0.5
    return around(mean, (better - worse) / n, sqrt(better + worse - (better - worse) ** 2 / n) / n)


def around(value: float, centre: float, error: float) -> Interval:
    """A value with the normal 95 % interval around a centre."""
    half = float(norm.ppf((1 + COVERAGE) / 2)) * error
    return Interval(value, centre - half, centre + half)
