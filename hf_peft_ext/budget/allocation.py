"""One way to spend a budget on labels and distillation."""

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["label", "distil", "label and distil", "llm labels"]


@dataclass(frozen=True)
class BudgetAllocation:
    """What a strategy buys, and the score to expect.

    Args:
        strategy: "label", "distil", "label and distil" or "llm labels".
        score: expected score.
        cost: money, without the pilot.
        gpu_hours: hours of one GPU.
        labels_bought: labels of human annotators, besides those at hand.
        unlabelled: items to distil on.
        llm_labels: labels of an LLM.
        interval: central 95 % of the bootstrap's scores of one run.
    """

    strategy: Strategy
    score: float
    cost: float
    gpu_hours: float
    labels_bought: int = 0
    unlabelled: int = 0
    llm_labels: int = 0
    interval: tuple[float, float] | None = None
