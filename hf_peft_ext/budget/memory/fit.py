"""The largest whole number whose cost fits a limit."""

import sys
from collections.abc import Callable

MOST_ESTIMATES = 40  # bounds the number of estimates


def largest_fitting(cost: Callable[[int], int], limit: int, start: int, most: int | None = None) -> int:
    """The largest n >= 1 with cost(n) <= limit, 0 if there is none; `cost` grows with n.

    A bracket is found by extrapolation, and narrowed by interpolation, both exact where the cost is affine, and by its
    middle in every third try.

    Args:
        cost: the cost of n.
        limit: the limit.
        start: the first n to try.
        most: n is not tried above it.
    """
    if most is not None and cost(most) <= limit:
        return most
    low, low_cost = 1, cost(1)
    if low_cost > limit:
        return 0
    largest = sys.maxsize if most is None else most
    high = min(max(start, 2), largest)
    high_cost = cost(high)
    while high_cost <= limit:
        slope = (high_cost - low_cost) / (high - low)
        reach = high + (limit - high_cost) / slope if slope > 0 else 2 * high
        low, low_cost = high, high_cost
        high = min(max(2 * high, min(int(1.01 * reach) + 1, 64 * high)), largest)
        high_cost = cost(high)
    for attempt in range(MOST_ESTIMATES):
        if high - low <= 1:
            break
        share = 0.5 if attempt % 3 == 2 else (limit - low_cost) / (high_cost - low_cost)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        middle_cost = cost(middle)
        if middle_cost <= limit:
            low, low_cost = middle, middle_cost
        else:
            high, high_cost = middle, middle_cost
    return low
