"""The search of one seed for the smallest dimension that reaches a score: bisection on log d."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bisection:
    """Bisection on log d, as if scores grew with d.

    The two ends are tried first. Then the middle of the bracket is tried until its ends are close enough.

    Args:
        threshold: the score to reach.
        smallest, largest: the dimensions between which to search.
        precision: the factor between the ends of a bracket that is narrow enough, above 1.
    """

    threshold: float
    smallest: int
    largest: int
    precision: float

    def bracket(self, scores: Mapping[int, float]) -> tuple[int, int, list[int]]:
        """The bracket so far, and the dimensions to try next: both ends, then a middle, or none at the end.

        Args:
            scores: dimension -> score of this seed.

        Returns:
            The largest dimension of the path that missed the threshold, the smallest one that reached it, and the next
            ones. The first is 0 if the smallest dimension reached it; the second is 0 if the largest missed it.
        """
        ends = [d for d in dict.fromkeys((self.smallest, self.largest)) if d not in scores]
        if ends:
            return self.smallest, self.largest, ends
        if scores[self.largest] < self.threshold:
            return self.largest, 0, []
        if scores[self.smallest] >= self.threshold:
            return 0, self.smallest, []
        low, high = self.smallest, self.largest
        while high / low > self.precision:
            middle = round(math.sqrt(low * high))
            if middle in (low, high):
                break
            if middle not in scores:
                return low, high, [middle]
            low, high = (low, middle) if scores[middle] >= self.threshold else (middle, high)
        return low, high, []
