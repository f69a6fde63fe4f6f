"""The result of a comparison: a row for each method, and the recommendation; as objects and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_peft_ext.compare.inference import Verdict

RESULT_FILE = "compare.json"


@dataclass(frozen=True)
class MethodScores:
    """What a comparison measured of one method. What was not measured is None.

    Args:
        name: the method.
        title: its name in tables.
        config: the `peft` section of its runs.
        learning_rate: the chosen one.
        rates: learning rate -> score on the dev rows when it was stopped or finished.
        scores: seed -> score on the dev rows, at the chosen learning rate.
        mean: their mean.
        interval: its 95 % interval.
        difference: mean difference from the reference, by seed.
        difference_interval: its 95 % interval.
        p_value: of the paired t-test against the reference.
        p_adjusted: adjusted for the number of methods.
        verdict: better or worse than the reference, or a tie.
        parameters: number of trained parameters, without the head.
        is_fixed_size: whether a budget cannot change it.
        bytes: size of what is saved for a task, with the head.
        step_seconds: median time of a training step.
        step_ratio: over that of the reference.
        memory: peak bytes of a training step.
        base_loss, adapter_loss: mean loss of a token of the general texts, without and with the adapter.
        seconds: time spent on all its runs.
        failed: number of failed runs at the chosen rate.
        error: the first error.
    """

    name: str
    title: str
    config: dict[str, Any]
    learning_rate: float | None
    rates: dict[str, float]
    scores: dict[int, float]
    mean: float | None
    interval: tuple[float, float] | None
    difference: float | None
    difference_interval: tuple[float, float] | None
    p_value: float | None
    p_adjusted: float | None
    verdict: Verdict
    parameters: int | None
    is_fixed_size: bool
    bytes: int | None
    step_seconds: float | None
    step_ratio: float | None
    memory: int | None
    base_loss: float | None
    adapter_loss: float | None
    seconds: float
    failed: int
    error: str | None


@dataclass(frozen=True)
class MethodComparison:
    """The result of `compare`.

    Args:
        methods: in the order of the arguments.
        reference: the method that the others are tested against.
        score: name of the score.
        higher_is_better: False if the score is a loss.
        recommendation: one sentence.
        winner: the recommended method; None if there is none.
        rows: number of training rows, dev rows and test rows; None without test rows.
        settings: model, data, budget, seeds, rates.
        notes: what was left out, and why.
        folder: the folder of the trained winner, None if it was not trained.
        test_score: the winner's score on the test rows, None without test rows.
    """

    methods: Sequence[MethodScores]
    reference: str
    score: str
    higher_is_better: bool
    recommendation: str
    winner: str | None
    rows: dict[str, int | None]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    folder: str | None = None
    test_score: float | None = None

    def of(self, name: str) -> MethodScores:
        """The results of a method."""
        return next(method for method in self.methods if method.name == name)

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def save(self, folder: Path) -> Path:
        """Write `compare.json` into a folder, and return its path."""
        path = folder / RESULT_FILE
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path
