"""Intervals and paired tests of scores, and the recommendation that follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np
from scipy import stats

LEVEL = 0.95
Verdict = Literal["reference", "better", "worse", "tie", "failed"]


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test of a method's scores against those of the reference, by seed.

    Args:
        difference: mean of the differences, method less reference.
        low, high: its 95 % interval; None if it is not defined.
        p_value: two-sided; None if the differences have no spread, or there are fewer than two.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float | None


def mean_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t interval of the mean of scores; None for fewer than two."""
    if len(scores) < 2:
        return None
    if np.ptp(scores) == 0:
        return float(scores[0]), float(scores[0])
    error = stats.sem(scores)
    low, high = stats.t.interval(LEVEL, len(scores) - 1, loc=fmean(scores), scale=error)
    return float(low), float(high)


def paired_test(scores: Mapping[int, float], reference: Mapping[int, float]) -> PairedTest | None:
    """Compare two methods by the seeds that both have.

    Differences without spread are no evidence: with few dev rows, accuracies take few values. They have no p-value.

    Args:
        scores: seed -> score of the method.
        reference: seed -> score of the reference.

    Returns:
        The test; None if no seed has both.
    """
    seeds = sorted(scores.keys() & reference.keys())
    first, second = [scores[seed] for seed in seeds], [reference[seed] for seed in seeds]
    if not seeds:
        return None
    differences = np.subtract(first, second)
    if len(seeds) < 2 or np.ptp(differences) <= 1e-12:
        return PairedTest(float(differences.mean()), None, None, None)
    test: Any = stats.ttest_rel(first, second)
    interval = test.confidence_interval(LEVEL)
    return PairedTest(float(differences.mean()), float(interval.low), float(interval.high), float(test.pvalue))


def adjusted(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """The p-values of several methods, adjusted for their number (Benjamini and Hochberg 1995)."""
    defined = {name: p for name, p in p_values.items() if p is not None}
    if not defined:
        return dict(p_values)
    corrected = stats.false_discovery_control(list(defined.values()))
    return {**p_values, **dict(zip(defined, map(float, corrected), strict=True))}


def verdict(test: PairedTest | None, p_adjusted: float | None, higher_is_better: bool) -> Verdict:
    """Whether a method is better or worse than the reference, or a tie: not significant at 0.05."""
    if test is None:
        return "failed"
    if p_adjusted is None or p_adjusted >= 1 - LEVEL:
        return "tie"
    return "better" if (test.difference > 0) == higher_is_better else "worse"
