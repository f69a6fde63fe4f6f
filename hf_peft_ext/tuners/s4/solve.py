"""Solves sizes from a budget: width, length or rank of the strategies of each layer.

The paper of S4 gives the total number of parameters, and whether they grow from layer to layer. It does not divide a
layer's parameters among its strategies, and does not say how BitFit counts, which has a fixed size. Here

- each layer gets a share of the budget. A layer whose strategies exceed it at their smallest gets these sizes, a
  layer with BitFit alone gets BitFit, and the other layers share the rest;
- inside a layer, fixed parameters (all of BitFit, the output bias of an adapter) are subtracted first, and the
  strategies with a size divide the rest equally, in parameters;
- the remainder of rounding to whole sizes goes to the next strategy, and from the last one to the next layer.
"""

from collections.abc import Mapping, Sequence

from hf_peft_ext.tuners.s4.costs import Costs

TOLERANCE = 0.05


class OutOfReach(ValueError):
    """No sizes come close enough to a budget."""


def solve(
    costs: Costs, assigned: Mapping[int, Sequence[str]], shares: Mapping[int, float], budget: float
) -> dict[int, dict[str, int]]:
    """Layer -> strategy -> its size.

    Args:
        costs: of the strategies in the model.
        assigned: layer -> its strategies.
        shares: layer -> its share, in any unit.
        budget: all parameters, as a share of the base model's.

    Raises:
        OutOfReach: the closest sizes are more than 5 % away from the budget; the message gives their total.
    """
    placeable = {layer: [s for s in strategies if layer in costs.of[s]] for layer, strategies in assigned.items()}
    placeable = {layer: strategies for layer, strategies in placeable.items() if strategies}
    wanted = budget * costs.parameters
    due = layer_targets(costs, placeable, shares, wanted)
    sizes: dict[int, dict[str, int]] = {}
    carried = 0.0
    for layer in sorted(placeable):
        sizes[layer] = layer_sizes(costs, layer, placeable[layer], due[layer] + carried)
        carried += due[layer] - costs.parameters_at(layer, sizes[layer])
    total = sum(costs.parameters_at(layer, of) for layer, of in sizes.items())
    if abs(total - wanted) > TOLERANCE * wanted:
        raise OutOfReach(out_of_reach(costs, placeable, budget, total))
    return sizes


def layer_targets(
    costs: Costs, assigned: Mapping[int, Sequence[str]], shares: Mapping[int, float], wanted: float
) -> dict[int, float]:
    """Parameters due to each layer: its share, but at least the smallest sizes of its strategies.

    Args:
        costs, assigned, shares: as in `solve`.
        wanted: number of parameters of all layers.
    """
    smallest = {layer: costs.parameters_at(layer, dict.fromkeys(s, 1)) for layer, s in assigned.items()}
    growing = {layer for layer, s in assigned.items() if any(costs.of[name][layer].unit for name in s)}
    while growing:
        left = wanted - sum(smallest[layer] for layer in smallest if layer not in growing)
        rate = left / sum(shares[layer] for layer in growing)
        short = {layer for layer in growing if rate * shares[layer] < smallest[layer]}
        if not short:
            return {layer: rate * shares[layer] if layer in growing else smallest[layer] for layer in smallest}
        growing -= short
    return dict(smallest)


def layer_sizes(costs: Costs, layer: int, strategies: Sequence[str], due: float) -> dict[str, int]:
    """The sizes of a layer's strategies, the coarsest first, so that the finest absorbs the rounding."""
    cost = {strategy: costs.of[strategy][layer] for strategy in strategies}
    left = due - sum(c.fixed for c in cost.values())
    sized = sorted((s for s in strategies if cost[s].unit), key=lambda s: -cost[s].unit)
    sizes = dict.fromkeys(strategies, 1)
    for i, strategy in enumerate(sized):
        sizes[strategy] = max(1, round(left / (len(sized) - i) / cost[strategy].unit))
        left -= sizes[strategy] * cost[strategy].unit
    return sizes


def out_of_reach(costs: Costs, assigned: Mapping[int, Sequence[str]], budget: float, total: int) -> str:
    """The error for a budget that cannot be met; `total` is the closest number of parameters."""
    wanted, nearest = budget * costs.parameters, f"{total:,} parameters, a budget of {total / costs.parameters:.3g}"
    fixed = sum(cost.fixed for layer, s in assigned.items() for cost in (costs.of[name][layer] for name in s))
    start = f"`budget` (={budget}) is {wanted:,.0f} of {costs.parameters:,} parameters, which these strategies cannot"
    if not any(costs.of[name][layer].unit for layer, s in assigned.items() for name in s):
        return f"{start} meet: BitFit has no size, and takes {nearest}."
    if total > wanted:
        return (
            f"{start} get down to: at their smallest they take {nearest} ({fixed:,} are biases, which have no size)."
        )
    return f"{start} meet: the nearest is {nearest}."
