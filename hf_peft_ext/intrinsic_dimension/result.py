"""The result of a measurement: d90 with its interval, and every run; as an object and as JSON."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_peft_ext.compare.inference import mean_interval

RESULT_JSON = "intrinsic_dimension.json"


@dataclass(frozen=True)
class IntrinsicDimension:
    """The result of `measure_intrinsic_dimension`.

    Args:
        score: name of the score.
        share: the share of the score of full fine-tuning to reach.
        full: seed -> score of full fine-tuning.
        scores: seed -> dimension -> score. Runs that failed are left out.
        brackets: seed -> the last dimension that missed the threshold and the one that reached it. The first is 0 if
            the smallest dimension reached it, the second if the largest missed it.
        settings: model, data, range and other settings.
        errors: the errors of failed runs; those dimensions count as missed.
    """

    score: str
    share: float
    full: dict[int, float]
    scores: dict[int, dict[int, float]]
    brackets: dict[int, tuple[int, int]]
    settings: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def threshold(self) -> float:
        """The score to reach."""
        return self.share * fmean(self.full.values())

    @property
    def d(self) -> float | None:
        """The geometric mean over seeds of the smallest dimension that was tried and reached the threshold.

        None if a seed's lies outside the searched range.
        """
        logs = self._logs()
        return None if logs is None else math.exp(fmean(logs[1]))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t interval over seeds, on the logarithmic scale; None for one seed, or without `d`.

        It begins at the lower bound for the dimensions that missed, and ends at the upper bound for those that
        reached: brackets have a width, and seeds may share them.
        """
        logs = self._logs()
        intervals = [] if logs is None else [mean_interval(ends) for ends in logs]
        if not intervals or intervals[0] is None or intervals[1] is None:
            return None
        return math.exp(intervals[0][0]), math.exp(intervals[1][1])

    def _logs(self) -> tuple[list[float], list[float]] | None:
        """The logarithms of the brackets' lower and upper ends; None if one is open."""
        if not self.brackets or not all(low and high for low, high in self.brackets.values()):
            return None
        return [math.log(low) for low, _ in self.brackets.values()], [
            math.log(high) for _, high in self.brackets.values()
        ]

    @property
    def sentence(self) -> str:
        """The result in a sentence."""
        name, full = f"d{100 * self.share:.0f}", fmean(self.full.values())
        goal = f"{self.score} {self.threshold:.3f}, {self.share:.0%} of full fine-tuning's {full:.3f}"
        if self.d is not None:
            bounds = "" if self.interval is None else f" [{self.interval[0]:.0f}, {self.interval[1]:.0f}]"
            return (
                f"{name} = {self.d:.0f}{bounds}, over {len(self.brackets)} seeds: the smallest d that reaches {goal}."
            )
        above = sum(not high for _, high in self.brackets.values())
        below = sum(not low for low, _ in self.brackets.values())
        where = [f"{above} seeds need more than the largest d"] * bool(above)
        where += [f"{below} seeds reach it at the smallest d"] * bool(below)
        return f"{name} is outside the range that was searched: {' and '.join(where)} ({goal})."

    def means(self) -> dict[int, float]:
        """Dimension -> mean score over the seeds that tried it, in ascending order."""
        tried = sorted({d for scores in self.scores.values() for d in scores})
        return {d: fmean(scores[d] for scores in self.scores.values() if d in scores) for d in tried}

    def to_json(self) -> str:
        """The result as JSON."""
        derived = {"d": self.d, "interval": self.interval, "threshold": self.threshold, "sentence": self.sentence}
        return json.dumps({**derived, **asdict(self)}, indent=1, ensure_ascii=False)

    def save(self, folder: Path) -> Path:
        """Write `intrinsic_dimension.json` into a folder, and return its path."""
        path = folder / RESULT_JSON
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path
