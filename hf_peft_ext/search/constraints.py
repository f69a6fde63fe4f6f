"""Compares the constraints of a stage by the scores of their models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import ttest_ind_from_stats

from hf_peft_ext.validation.checks import check


@dataclass(frozen=True)
class ConstraintComparison:
    """The scores of a stage, compared.

    Args:
        winner: the constraint with the highest mean, the first of equals.
        runner_up: the constraint with the next highest mean; None if only one has scores.
        means: constraint -> mean of its scores; NaN without a score.
        spreads: constraint -> standard deviation of its scores; NaN with fewer than two.
        runs: constraint -> number of scores.
        p_value: of a two-sided Welch's t-test between winner and runner-up; None if it is not defined.
        tie: whether the difference between the two is not significant; then the winner may be chance.
    """

    winner: str
    runner_up: str | None
    means: dict[str, float]
    spreads: dict[str, float]
    runs: dict[str, int]
    p_value: float | None
    tie: bool


def compare_constraints(scores: Mapping[str, Sequence[float]], alpha: float = 0.05) -> ConstraintComparison:
    """Find the constraint with the highest mean, and test whether it is significantly above the next.

    The p-value is for a single comparison. Winner and runner-up were picked from several constraints by the same
    scores, so the p-value is rather too small.

    Args:
        scores: constraint -> the score of each model, higher is better; NaN, a failed run, is left out.
        alpha: the difference is significant if the p-value is smaller.

    Raises:
        ValueError: no run has a score.
    """
    finished = {name: [score for score in values if not math.isnan(score)] for name, values in scores.items()}
    means = {name: fmean(values) if values else math.nan for name, values in finished.items()}
    ranked = sorted((name for name in finished if finished[name]), key=lambda name: -means[name])
    check("scores", dict(scores), bool(ranked), "must hold the score of at least one run")
    winner, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    p_value = None if runner_up is None else welch(finished[winner], finished[runner_up])
    return ConstraintComparison(
        winner=winner,
        runner_up=runner_up,
        means=means,
        spreads={name: stdev(values) if len(values) > 1 else math.nan for name, values in finished.items()},
        runs={name: len(values) for name, values in finished.items()},
        p_value=p_value,
        tie=runner_up is not None and (p_value is None or p_value >= alpha),
    )


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The p-value of Welch's t-test; None for a single score or for scores without spread."""
    if min(len(first), len(second)) < 2 or not (stdev(first) or stdev(second)):
        return None
    moments = (fmean(first), stdev(first), len(first), fmean(second), stdev(second), len(second))
    test: Any = ttest_ind_from_stats(*moments, equal_var=False)
    return float(test.pvalue)
