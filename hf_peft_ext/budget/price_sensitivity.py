"""How a plan changes with the prices."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hf_peft_ext.budget.annotation_inputs import AnnotationInputs
from hf_peft_ext.budget.score_model import ScoreModel
from hf_peft_ext.budget.spending import best_allocation

PRICES = ("price_per_label", "price_per_gpu_hour", "llm_price_per_label")
FACTORS = np.geomspace(1, 100, 21)[1:]
BISECTIONS = 8


@dataclass(frozen=True)
class PriceEffect:
    """The effect of one price; the others are as in the inputs.

    Args:
        price: the input's name.
        value: the price.
        at_half: the best strategy and its expected score at half the price.
        at_double: the same at twice the price.
        switches_below: the highest lower price at which another strategy is best; None down to a hundredth.
        switches_above: the lowest higher price at which another strategy is best; None up to a hundredfold.
    """

    price: str
    value: float
    at_half: tuple[str, float]
    at_double: tuple[str, float]
    switches_below: float | None
    switches_above: float | None


def price_sensitivity(model: ScoreModel, inputs: AnnotationInputs, best: str) -> list[PriceEffect]:
    """The effect of each price that is not 0.

    Args:
        model: the fitted curves.
        inputs: the inputs.
        best: the best strategy at the inputs' prices.
    """
    effects = []
    for name in PRICES:
        price = getattr(inputs, name)
        if not price:
            continue

        def winner(factor: float, name: str = name, price: float = price) -> tuple[str, float]:
            plan = best_allocation(model, replace(inputs, **{name: price * factor}))
            return plan.strategy, plan.score

        below, above = (switching_factor(winner, best, direction) for direction in (-1, 1))
        below, above = (None if factor is None else price * factor for factor in (below, above))
        effects.append(PriceEffect(name, price, winner(0.5), winner(2.0), below, above))
    return effects


def switching_factor(winner: Callable[[float], tuple[str, float]], best: str, direction: int) -> float | None:
    """The factor on a price, nearest to 1, at which another strategy wins; to about half a per mille.

    Args:
        winner: factor -> (strategy, score).
        best: the strategy at factor 1.
        direction: 1 for higher prices, -1 for lower ones.
    """
    previous = 1.0
    for factor in FACTORS**direction:
        if winner(factor)[0] != best:
            for _ in range(BISECTIONS):
                middle = (previous * factor) ** 0.5
                previous, factor = (middle, factor) if winner(middle)[0] == best else (previous, middle)
            return float(factor)
        previous = factor
    return None
