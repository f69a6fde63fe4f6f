"""The gain of a plugged model over the untouched large model on test rows, with an interval."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_peft_ext.validation.checks import check

CONFIDENCE = 0.95


@dataclass
class Measured:
    """A model's scores on rows.

    Args:
        accuracy: share of the rows that it answers right.
        auc: area under the ROC curve of the log-odds of an answer against the others, averaged over answers. It does
            not depend on which answer the model prefers in general; 0.5 is chance.
        margin: mean of log p(right answer) - log p(best wrong one).
        correct: whether each row is answered right.
    """

    accuracy: float
    auc: float
    margin: float
    correct: list[bool]

    @classmethod
    def of(cls, scores: Sequence[Tensor], answers: Sequence[int]) -> "Measured":
        """Measure the log-probabilities of each row's answers by the index of the right one.

        Raises:
            ValueError: there are no rows, or an answer has no score.
        """
        check("answers", len(answers), len(answers) == len(scores) > 0, f"must be one for each of {len(scores)} rows")
        for score, answer in zip(scores, answers, strict=True):
            check("answer", answer, 0 <= answer < len(score), f"must be the index of one of {len(score)} answers")
        correct = [int(score.argmax()) == answer for score, answer in zip(scores, answers, strict=True)]
        margins = [margin(score, answer) for score, answer in zip(scores, answers, strict=True)]
        return cls(sum(correct) / len(correct), auc(scores, answers), sum(margins) / len(margins), correct)


def margin(score: Tensor, answer: int) -> float:
    """log p(answer) - log p(best other answer); 0 without another answer."""
    others = torch.cat([score[:answer], score[answer + 1 :]])
    return float(score[answer] - others.max()) if len(others) else 0.0


def auc(scores: Sequence[Tensor], answers: Sequence[int]) -> float:
    """The mean AUC of the answers that are right in some rows and wrong in others; 0.5 without such an answer."""
    from sklearn.metrics import roc_auc_score  # slow to import, as is scipy

    areas = []
    for index in range(max(len(score) for score in scores)):
        pairs = [(log_odds(s, index), a == index) for s, a in zip(scores, answers, strict=True) if index < len(s) > 1]
        if {right for _, right in pairs} == {True, False}:
            areas.append(roc_auc_score([right for _, right in pairs], [odds for odds, _ in pairs]))
    return float(sum(areas) / len(areas)) if areas else 0.5


def log_likelihood(scores: Sequence[Tensor], answers: Sequence[int]) -> float:
    """Mean log-probability of the right answers."""
    return sum(float(score[answer]) for score, answer in zip(scores, answers, strict=True)) / len(answers)


def log_odds(score: Tensor, index: int) -> float:
    """log p_index - log sum of the other p."""
    others = torch.cat([score[:index], score[index + 1 :]])
    return float(score[index] - others.logsumexp(0))


@dataclass
class PlugInResult:
    """The untouched large model and the plugged one on the same test rows.

    Args:
        base: the large model without the adapter.
        plugged: with it, at `scale`.
        scale: the factor of the adapter, chosen on the dev rows; 0 is always among the choices.
        tried: scale -> accuracy on the dev rows.
        low, high: the 95 % interval of the gain, by a BCa bootstrap over rows, paired.
    """

    base: Measured
    plugged: Measured
    scale: float
    tried: dict[float, float]
    low: float
    high: float

    @classmethod
    def of(
        cls, base: Measured, plugged: Measured, scale: float, tried: dict[float, float], seed: int = 0
    ) -> "PlugInResult":
        """The result with the interval of its gain.

        Args:
            seed: of the bootstrap; the rest as in the class.
        """
        low, high = gain_interval(base.correct, plugged.correct, seed)
        return cls(base, plugged, scale, tried, low, high)

    @property
    def gain(self) -> float:
        """Accuracy of the plugged model minus that of the untouched one."""
        return self.plugged.accuracy - self.base.accuracy

    @property
    def gains(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.scale != 0 and self.low > 0

    def __str__(self) -> str:
        if self.scale == 0:
            return "no gain: scale 0, the untouched large model, was the best on the dev rows"
        verdict = "gain" if self.gains else "no gain"
        a, b = self.base, self.plugged
        return (
            f"{verdict}: accuracy {a.accuracy:.3f} -> {b.accuracy:.3f} ({self.gain:+.3f}, 95 % interval "
            f"{self.low:+.3f} to {self.high:+.3f}, {len(a.correct)} rows), AUC {a.auc:.3f} -> {b.auc:.3f}, "
            f"margin {a.margin:+.3f} -> {b.margin:+.3f}, scale {self.scale:g}"
        )

    def save(self, path: Path) -> None:
        """Write the result as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "PlugInResult":
        """Read what `save` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields |= {name: Measured(**fields[name]) for name in ("base", "plugged")}
        fields["tried"] = {float(scale): value for scale, value in fields["tried"].items()}
        return cls(**fields)


def gain_interval(base: Sequence[bool], plugged: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences, by a BCa bootstrap.

    Args:
        base, plugged: whether each row is answered right, for the same rows.
        seed: of the bootstrap.
    """
    check(
        "base", len(base), len(base) == len(plugged) > 1, f"must be of the same rows, two or more, as {len(plugged)}"
    )
    from scipy.stats import bootstrap

    differences = [float(b) - float(a) for a, b in zip(base, plugged, strict=True)]
    if len(set(differences)) == 1:  # a bootstrap of equal values is undefined
        return differences[0], differences[0]
    interval = bootstrap(
        (differences,), lambda x, axis: x.mean(axis), confidence_level=CONFIDENCE, rng=seed, n_resamples=2000
    ).confidence_interval
    return float(interval.low), float(interval.high)
