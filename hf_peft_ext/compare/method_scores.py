"""What a comparison measured of one method."""

from dataclasses import dataclass
from typing import Any

from hf_peft_ext.compare.inference import Verdict


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
        bytes: size of the weights that are saved for a task, with the head.
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
