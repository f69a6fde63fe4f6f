"""Label or distil: how to spend a budget on a small model.

Kang et al. 2023, "Distill or Annotate? Cost-Efficient Fine-Tuning of Compact Models"
(https://arxiv.org/abs/2305.01645), compare the strategies. This planner predicts their scores from a pilot.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hf_peft_ext.budget.allocation import BudgetAllocation
from hf_peft_ext.budget.annotation_inputs import AnnotationInputs
from hf_peft_ext.budget.break_even import BreakEven, break_even, label_cost_to_match
from hf_peft_ext.budget.price_sensitivity import PriceEffect, price_sensitivity
from hf_peft_ext.budget.score_model import ScoreModel
from hf_peft_ext.budget.spending import allocations, best_allocation


@dataclass(frozen=True)
class AnnotationPlan:
    """The result of `label_or_distil`.

    Args:
        best: the allocation with the highest expected score.
        allocations: the best allocation of each strategy that the budget allows, best first.
        probability_best: share of the bootstrap draws in which `best` has the highest score.
        score_now: expected score of the student on the labels at hand.
        break_even: budgets at which labels and distillation have the same expected score.
        label_cost_to_match: money for as many labels as reach the best distilled student's expected score; None if
            the pool's labels do not reach it.
        sensitivity: an entry for each price.
        notes: what the plan assumes or extrapolates.
        inputs: the inputs.
    """

    best: BudgetAllocation
    allocations: list[BudgetAllocation]
    probability_best: float
    score_now: float
    break_even: list[BreakEven]
    label_cost_to_match: float | None
    sensitivity: list[PriceEffect]
    notes: list[str]
    inputs: AnnotationInputs

    def of(self, strategy: str) -> BudgetAllocation | None:
        """The allocation of a strategy; None if the budget does not allow it."""
        return next((plan for plan in self.allocations if plan.strategy == strategy), None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)


def label_or_distil(inputs: AnnotationInputs, seed: int = 0) -> AnnotationPlan:
    """Choose how to spend a budget: on labels, on distillation, on both, or on labels of an LLM.

    Args:
        inputs: prices, pools, throughputs and pilot scores.
        seed: of the bootstrap.

    Raises:
        ValueError: a pilot curve has fewer than three sizes.
    """
    model = ScoreModel.fit(inputs, seed)
    plans = allocations(model, inputs)
    samples = {plan.strategy: model.sample(plan) for plan in plans}
    plans = [replace(plan, interval=central_95(samples[plan.strategy])) for plan in plans]
    stacked = np.stack([samples[plan.strategy] for plan in plans])  # (strategies, draws)
    return AnnotationPlan(
        best=plans[0],
        allocations=plans,
        probability_best=float((stacked.argmax(0) == 0).mean()),
        score_now=model.student_score(inputs.labels_available),
        break_even=break_even(model, inputs),
        label_cost_to_match=label_cost_to_match(model, inputs, plans),
        sensitivity=price_sensitivity(model, inputs, best_allocation(model, inputs).strategy),
        notes=plan_notes(model, inputs, plans),
        inputs=inputs,
    )


def central_95(samples: np.ndarray) -> tuple[float, float]:
    """The central 95 % of the samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def plan_notes(model: ScoreModel, inputs: AnnotationInputs, plans: list[BudgetAllocation]) -> list[str]:
    """What the plan extrapolates or leaves out."""
    texts = []
    for plan in plans:
        used, curve, what = (
            (plan.unlabelled, model.relative, "unlabelled items")
            if plan.unlabelled
            else (inputs.labels_available + plan.labels_bought + plan.llm_labels, model.student, "labels")
        )
        low, high = curve.sizes
        if not low <= used <= high:
            texts.append(f"{plan.strategy}: {used:,} {what} is extrapolated; the pilot has {low:,.0f} to {high:,.0f}.")
    if model.teacher is None:
        texts.append("The teacher has fewer than three scores, so it is assumed not to improve with more labels.")
    strategies = {plan.strategy for plan in plans}
    if "distil" not in strategies:
        texts.append("distil: the budget does not pay for the teacher's training and one item.")
    if "llm labels" in strategies:
        texts.append(f"llm labels: no pilot; its errors are assumed to be {inputs.llm_errors}.")
    return texts
