"""The figure of a plan: expected score against budget for each strategy."""

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from hf_peft_ext.budget.annotation import AnnotationPlan, central_95
from hf_peft_ext.budget.score_model import ScoreModel
from hf_peft_ext.budget.spending import allocations

STRATEGY_COLORS = {"label": "#2e933c", "distil": "#1f5fbf", "label and distil": "#8a5fbf", "llm labels": "#d1495b"}
BUDGET_POINTS = 40


def annotation_figure(plan: AnnotationPlan) -> Figure:
    """Expected score with its 95 % interval against the budget; the budget and the break-even points are marked."""
    inputs, model = plan.inputs, ScoreModel.fit(plan.inputs)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for budget in np.linspace(max(inputs.pilot_cost, 0.05 * inputs.budget), 2 * inputs.budget or 1.0, BUDGET_POINTS):
        for option in allocations(model, replace(inputs, budget=float(budget))):
            low, high = central_95(model.sample(option))
            lines.setdefault(option.strategy, []).append((float(budget), option.score, low, high))
    for strategy, rows in lines.items():
        budgets, scores, lows, highs = zip(*rows, strict=True)
        axes.plot(budgets, scores, color=STRATEGY_COLORS[strategy], label=strategy)
        axes.fill_between(budgets, lows, highs, color=STRATEGY_COLORS[strategy], alpha=0.12, linewidth=0)
    axes.axvline(inputs.budget, color="0.4", linestyle="--", linewidth=1)
    for point in plan.break_even:
        if point.budget <= 2 * inputs.budget:
            axes.axvline(point.budget, color="0.7", linestyle=":", linewidth=1)
    axes.set(xlabel="budget", ylabel="expected score")
    axes.legend(frameon=False)
    return figure
