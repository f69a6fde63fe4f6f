"""Layer groups: the number of layers in each group of a pattern, and each layer's share of the parameters."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Literal, get_args

from hf_peft_ext.validation.checks import check, check_count

Grouping = Literal["increasing", "uniform", "decreasing", "spindle", "bottleneck"]
Allocation = Literal["increasing", "uniform", "decreasing"]
GROUPINGS, ALLOCATIONS = get_args(Grouping), get_args(Allocation)
MOST_WAYS = 100_000  # to group the layers of one stack


def relations(grouping: Grouping, num_groups: int) -> tuple[str, ...]:
    """Comparisons of the sizes of neighbouring groups, such as ("<", "=", ">") for N1 < N2 = N3 > N4, the spindle.

    S4, Chen et al. 2023 (https://arxiv.org/abs/2301.01821), section 4.1. The paper has four groups; with more, spindle
    and bottleneck continue towards the middle: N1 < N2 < N3 > N4 > N5.
    """
    between = num_groups - 1
    middle, half = ("=",) * (between % 2), between // 2
    patterns = {
        "increasing": ("<",) * between,
        "uniform": ("=",) * between,
        "decreasing": (">",) * between,
        "spindle": ("<",) * half + middle + (">",) * half,
        "bottleneck": (">",) * half + middle + ("<",) * half,
    }
    return patterns[grouping]


@cache
def ways(grouping: Grouping, num_layers: int, num_groups: int) -> tuple[tuple[int, ...], ...]:
    """All sizes of `num_groups` groups of `num_layers` layers that follow a pattern, in order; may be empty.

    Raises:
        ValueError: there are more than a hundred thousand.
    """
    sizes = tuple(islice(compositions(("", *relations(grouping, num_groups)), num_layers), MOST_WAYS + 1))
    rule = f"groups {num_layers} layers in more than {MOST_WAYS} ways; pass the sizes as `grouping`"
    check("num_groups", num_groups, len(sizes) <= MOST_WAYS, rule)
    return sizes


def compositions(chain: Sequence[str], total: int, last: int = 0) -> Iterator[tuple[int, ...]]:
    """Positive whole numbers that add up to `total`, each compared with its predecessor by `chain`.

    Args:
        chain: a comparison for each number; "" compares it with nothing.
        total: their sum.
        last: the predecessor of the first.
    """
    after = chain[1:]
    low = {"<": last + 1, "=": last}.get(chain[0], 1)
    high = {">": last - 1, "=": last}.get(chain[0], total)
    if not after:
        if low <= total <= high:
            yield (total,)
        return
    rising = after.index(">") if ">" in after else len(after)  # so many of the rest are no smaller than this one
    for number in range(low, min(high, (total - len(after) + rising) // (1 + rising)) + 1):
        for rest in compositions(after, total - number, number):
            yield (number, *rest)


def group_sizes(grouping: Grouping | Sequence[int], num_layers: int, num_groups: int) -> tuple[int, ...]:
    """The sizes of the groups: those nearest to the proportions of the pattern, among all that follow it.

    The proportions are 1 : 1 : ... (uniform), 1 : 2 : 3 : ... (increasing), 1 : 3 : 3 : 1 (spindle; 1 : 3 : 5 : 3 : 1
    with five groups) and 3 : 1 : 1 : 3 (bottleneck). They give the paper's one example, a spindle of 3, 9, 9 and 3
    layers out of 24. Of two equally near, the more even one is taken: 2, 4, 4, 2 of 12, not 1, 5, 5, 1.

    Args:
        grouping: the pattern, or the sizes themselves.
        num_layers: number of layers of the stack.
        num_groups: number of groups.

    Raises:
        ValueError: no sizes follow the pattern, or explicit sizes do not add up to the number of layers.
    """
    if not isinstance(grouping, str):
        rule = f"must add up to the number of layers of each stack, which has {num_layers}"
        check("grouping", list(grouping), sum(grouping) == num_layers, rule)
        return tuple(grouping)
    rule = f"must be at most the number of layers, which is {num_layers}"
    check("num_groups", num_groups, num_groups <= num_layers, rule)
    candidates = ways(grouping, num_layers, num_groups)
    names = [f"N{i + 1}" for i in range(num_groups)]
    chain = names[0] + "".join(f" {r} {n}" for r, n in zip(relations(grouping, num_groups), names[1:], strict=True))
    rule = f"has no {num_groups} groups of {num_layers} layers with {chain}; take another pattern or number of groups"
    check("grouping", grouping, bool(candidates), f"{rule}, or pass the sizes")
    shares = proportions(grouping, num_groups)
    whole = sum(shares)

    def distance(sizes: tuple[int, ...]) -> tuple[int, int]:  # in whole numbers, so that ties are ties
        apart = sum((size * whole - num_layers * share) ** 2 for size, share in zip(sizes, shares, strict=True))
        return apart, sum(size**2 for size in sizes)

    return min(candidates, key=distance)


def proportions(grouping: Grouping, num_groups: int) -> list[int]:
    """The proportions of the groups' sizes."""
    rising = list(range(1, num_groups + 1))
    spindle = [2 * min(i, num_groups - 1 - i) + 1 for i in range(num_groups)]
    return {
        "increasing": rising,
        "uniform": [1] * num_groups,
        "decreasing": rising[::-1],
        "spindle": spindle,
        "bottleneck": [max(spindle) + 1 - share for share in spindle],
    }[grouping]


def layer_groups(stacks: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> list[list[int]]:
    """The layers of each group; a group holds a part of every stack.

    Args:
        stacks: the layers of each stack.
        sizes: for each stack the sizes of its groups.
    """
    groups: list[list[int]] = [[] for _ in sizes[0]]
    for stack, counts in zip(stacks, sizes, strict=True):
        layers = iter(stack)
        for group, count in zip(groups, counts, strict=True):
            group.extend(islice(layers, count))
    return groups


def layer_shares(allocation: Allocation, num_layers: int) -> list[float]:
    """Each layer's share of the parameters, as a multiple of the mean: 1, or on a line between 0.5 and 1.5.

    The paper (section 4.2) only distinguishes whether the number grows, stays or falls from layer to layer.

    Raises:
        ValueError: `num_layers` is no positive whole number.
    """
    check_count("num_layers", num_layers)
    slope = {"increasing": 1.0, "uniform": 0.0, "decreasing": -1.0}[allocation]
    return [1 + slope * (i / (num_layers - 1) - 0.5) if num_layers > 1 else 1.0 for i in range(num_layers)]
