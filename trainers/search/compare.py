from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import ttest_ind


@dataclass
class Comparison:
    winner: str
    means: dict[str, float]
    spreads: dict[str, float]
    runs: dict[str, int]
    p_value: float | None
    tie: bool


def compare(scores: Mapping[str, Sequence[float]]) -> Comparison:
    means = {c: mean(s) for c, s in scores.items()}
    ranked = sorted(means, key=means.__getitem__, reverse=True)
    p = None
    if len(ranked) > 1 and len({*scores[ranked[0]]}) > 1 and len({*scores[ranked[1]]}) > 1 and min(len(scores[c]) for c in ranked[:2]) > 1:
        p = float(ttest_ind(scores[ranked[0]], scores[ranked[1]], equal_var=False).pvalue)
    return Comparison(
        ranked[0], means, {c: stdev(s) if len(s) > 1 else 0.0 for c, s in scores.items()},
        {c: len(s) for c, s in scores.items()}, p, p is None or p > 0.05,
    )
