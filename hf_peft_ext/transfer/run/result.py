"""What a plug-in gains over the untouched large model, with an interval, on rows that nothing was chosen by."""

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
    """How a model answers.

    Args:
        accuracy: share of the rows that it answers right.
        auc: how well its log-odds of an answer against the others tell right answers from wrong ones, whatever it
            prefers in general: the area under the ROC curve, answer by answer, averaged. 0.5 is chance.
        margin: mean of log p(right answer) - log p(best wrong one).
        correct: whether each row is answered right.
    """

    accuracy: float
    auc: float
    margin: float
    correct: list[bool]

    @classmethod
    def of(cls, scores: Sequence[Tensor], answers: Sequence[int]) -> "Measured":
        """From the log-probabilities of each row's answers, and the index of the right one."""
        check("answers", len(answers), len(answers) == len(scores) > 0, f"must be one for each of {len(scores)} rows")
        for score, answer in zip(scores, answers, strict=True):
            check("answer", answer, 0 <= answer < len(score), f"must be the index of one of {len(score)} answers")
        correct = [int(score.argmax()) == answer for score, answer in zip(scores, answers, strict=True)]
        margins = [margin(score, answer) for score, answer in zip(scores, answers, strict=True)]
        return cls(sum(correct) / len(correct), auc(scores, answers), sum(margins) / len(margins), correct)


def margin(score: Tensor, answer: int) -> float:
    others = torch.cat([score[:answer], score[answer + 1 :]])
    return float(score[answer] - others.max()) if len(others) else 0.0


def auc(scores: Sequence[Tensor], answers: Sequence[int]) -> float:
    """Averaged over the answers that are right in some rows and wrong in others; 0.5 where there is none."""
    from sklearn.metrics import roc_auc_score  # slow to import, as is scipy

    found = []
    for index in range(max(len(score) for score in scores)):
        pairs = [(log_odds(s, index), a == index) for s, a in zip(scores, answers, strict=True) if index < len(s) > 1]
        if {right for _, right in pairs} == {True, False}:
            found.append(roc_auc_score([right for _, right in pairs], [odds for odds, _ in pairs]))
    return float(sum(found) / len(found)) if found else 0.5


def log_likelihood(scores: Sequence[Tensor], answers: Sequence[int]) -> float:
    """Mean log-probability of the right answers."""
    return sum(float(score[answer]) for score, answer in zip(scores, answers, strict=True)) / len(answers)


def log_odds(score: Tensor, index: int) -> float:
    others = torch.cat([score[:index], score[index + 1 :]])
    return float(score[index] - others.logsumexp(0))


@dataclass
class PlugInResult:
    """The untouched large model and the plugged one on the same held-back rows.

    Args:
        base: the large model without the module.
        plugged: with it, at `scale`.
        scale: the factor of the module, chosen on other rows; 0 is always among the choices.
        tried: scale -> share of right answers, on the rows that it was chosen by.
        low, high: the 95 % interval of the gain, by bootstrap over rows (BCa, pairs kept together).
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
        low, high = gain_interval(base.correct, plugged.correct, seed)
        return cls(base, plugged, scale, tried, low, high)

    @property
    def gain(self) -> float:
        """Accuracy of the plugged model less that of the untouched one."""
        return self.plugged.accuracy - self.base.accuracy

    @property
    def gains(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.scale != 0 and self.low > 0

    def __str__(self) -> str:
        if self.scale == 0:
            return "no gain: scale 0, the untouched large model, was the best on the rows to choose by"
        verdict = "gain" if self.gains else "no gain"
        a, b = self.base, self.plugged
        return (
            f"{verdict}: accuracy {a.accuracy:.3f} -> {b.accuracy:.3f} ({self.gain:+.3f}, 95 % interval "
            f"{self.low:+.3f} to {self.high:+.3f}, {len(a.correct)} rows), AUC {a.auc:.3f} -> {b.auc:.3f}, "
            f"margin {a.margin:+.3f} -> {b.margin:+.3f}, scale {self.scale:g}"
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "PlugInResult":
        found = json.loads(path.read_text(encoding="utf-8"))
        found |= {name: Measured(**found[name]) for name in ("base", "plugged")}
        found["tried"] = {float(scale): value for scale, value in found["tried"].items()}
        return cls(**found)


def gain_interval(base: Sequence[bool], plugged: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of paired differences, row by row."""
    check(
        "base", len(base), len(base) == len(plugged) > 1, f"must be of the same rows, two or more, as {len(plugged)}"
    )
    from scipy.stats import bootstrap

    differences = [float(b) - float(a) for a, b in zip(base, plugged, strict=True)]
    if len(set(differences)) == 1:  # nothing to draw from
        return differences[0], differences[0]
    found = bootstrap(
        (differences,), lambda x, axis: x.mean(axis), confidence_level=CONFIDENCE, rng=seed, n_resamples=2000
    ).confidence_interval
    return float(found.low), float(found.high)
