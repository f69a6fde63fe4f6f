"""Budgets at which labels and distillation are worth the same."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import numpy as np
from scipy.optimize import brentq

from hf_peft_ext.budget.allocation import BudgetAllocation
from hf_peft_ext.budget.annotation_inputs import AnnotationInputs
from hf_peft_ext.budget.score_model import ScoreModel
from hf_peft_ext.budget.spending import distil_options, label_option

BUDGETS, WIDEST = 60, 10.0  # points of the search, and its end in units of the budget


@dataclass(frozen=True)
class BreakEven:
    """A budget at which the better strategy changes.

    Args:
        budget: money, the pilot's cost included.
        better_above: "label" or "distil", the better one for a somewhat larger budget.
    """

    budget: float
    better_above: str


def break_even(model: ScoreModel, inputs: AnnotationInputs) -> list[BreakEven]:
    """Budgets up to ten times the given one at which labels and distillation change places.

    Below the smallest budget that pays for the teacher, labels are better.
    """

    def lead(budget: float) -> float:
        """The distilled student's lead over the student on labels, in points of the score."""
        there = replace(inputs, budget=budget)
        distilled = max((plan.score for plan in distil_options(model, there)), default=inputs.range[0] - 1)
        return distilled - label_option(model, there).score

    first = inputs.pilot_cost + inputs.teacher_training_hours * inputs.price_per_gpu_hour
    last = WIDEST * max(inputs.budget, first)
    if last == 0:
        return []
    budgets = np.geomspace(max(first, last * 1e-3, inputs.pilot_cost), last, BUDGETS)
    leads = [lead(float(budget)) for budget in budgets]
    crossings = []
    for (b_0, lead_0), (b_1, lead_1) in pairwise(zip(budgets, leads, strict=True)):
        if (lead_0 > 0) != (lead_1 > 0):
            root = b_0 if lead_0 == 0 else b_1 if lead_1 == 0 else cast(float, brentq(lead, b_0, b_1, xtol=1e-3 * b_0))
            crossings.append(BreakEven(float(root), "distil" if lead_1 > 0 else "label"))
    return crossings


def label_cost_to_match(model: ScoreModel, inputs: AnnotationInputs, plans: list[BudgetAllocation]) -> float | None:
    """Money for as many labels as reach the best distilled student's score (the paper's Table 4).

    None if there is no distilled student, or the pool's labels do not reach its score.
    """
    distilled = max((plan.score for plan in plans if plan.unlabelled), default=None)
    if distilled is None:
        return None
    labels = max(0.0, np.ceil(model.student.size_for(distilled)) - inputs.labels_available)
    return float(labels * inputs.price_per_label) if labels <= inputs.unlabelled_pool else None
