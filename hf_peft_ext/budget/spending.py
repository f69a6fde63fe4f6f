"""The best way to spend a budget by each strategy."""

from collections.abc import Iterator
from math import floor, inf

from hf_peft_ext.budget.allocation import BudgetAllocation
from hf_peft_ext.budget.annotation_inputs import AnnotationInputs
from hf_peft_ext.budget.score_model import ScoreModel

SPLITS = 40  # numbers of labels that "label and distil" tries


def allocations(model: ScoreModel, inputs: AnnotationInputs) -> list[BudgetAllocation]:
    """The best allocation of each strategy that the budget allows, highest expected score first."""
    plans = [label_option(model, inputs), *distil_options(model, inputs)]
    if inputs.llm_price_per_label is not None:
        plans.append(label_option(model, inputs, by_llm=True))
    return sorted(plans, key=lambda plan: -plan.score)


def best_allocation(model: ScoreModel, inputs: AnnotationInputs) -> BudgetAllocation:
    """The allocation with the highest expected score."""
    return allocations(model, inputs)[0]


def label_option(model: ScoreModel, inputs: AnnotationInputs, by_llm: bool = False) -> BudgetAllocation:
    """Buy labels for all of the budget, and train the student on them and those at hand."""
    price = inputs.llm_price_per_label if by_llm else inputs.price_per_label
    hours = 0.0 if inputs.student_items_per_hour is None else 1 / inputs.student_items_per_hour
    price_of_each = (price or 0.0) + hours * inputs.price_per_gpu_hour
    start = hours * inputs.labels_available
    bought = affordable(inputs.money - start * inputs.price_per_gpu_hour, price_of_each, inputs.unlabelled_pool)
    gpu_hours = start + hours * bought
    cost = bought * (price or 0.0) + gpu_hours * inputs.price_per_gpu_hour
    human, llm = (0, bought) if by_llm else (bought, 0)
    score = model.student_score(inputs.labels_available + human, llm)
    return BudgetAllocation("llm labels" if by_llm else "label", score, cost, gpu_hours, human, llm_labels=llm)


def distil_options(model: ScoreModel, inputs: AnnotationInputs) -> Iterator[BudgetAllocation]:
    """Train the teacher and distil for all of the budget; also with a part of it spent on labels for the teacher."""
    plan = distil_after(model, inputs, 0)
    if plan is not None:
        yield plan
    if model.teacher is None:
        return
    most = affordable(inputs.money, inputs.price_per_label, inputs.unlabelled_pool - 1)
    numbers = sorted({most * step // SPLITS for step in range(1, SPLITS + 1)} - {0})
    plans = [plan for n in numbers if (plan := distil_after(model, inputs, n)) is not None]
    if plans:
        yield max(plans, key=lambda plan: plan.score)


def distil_after(model: ScoreModel, inputs: AnnotationInputs, bought: int) -> BudgetAllocation | None:
    """Buy a number of labels, train the teacher, and distil for the rest; None if nothing is left.

    Hours: h_T (N + n) / N + U (1 / r_T + 1 / r_S), with n labels bought, U items, and r_T and r_S the throughputs.
    """
    labels = inputs.labels_available + bought
    teacher_hours = inputs.teacher_training_hours * labels / inputs.labels_available
    hours_of_each = 1 / inputs.teacher_items_per_hour
    if inputs.student_items_per_hour is not None:
        hours_of_each += 1 / inputs.student_items_per_hour
    fixed = bought * inputs.price_per_label + teacher_hours * inputs.price_per_gpu_hour
    items = affordable(
        inputs.money - fixed, hours_of_each * inputs.price_per_gpu_hour, inputs.unlabelled_pool - bought
    )
    if items < 1:
        return None
    gpu_hours = teacher_hours + items * hours_of_each
    cost = bought * inputs.price_per_label + gpu_hours * inputs.price_per_gpu_hour
    score = model.distilled_score(labels, items)
    return BudgetAllocation("label and distil" if bought else "distil", score, cost, gpu_hours, bought, items)


def affordable(money: float, price: float, most: int) -> int:
    """How many items the money buys, from 0 to `most`."""
    if money < 0:
        return 0
    return min(most, floor(min(money / price if price else inf, most) + 1e-6))  # quotients may round down
