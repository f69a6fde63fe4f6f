"""Solves sizes from a budget: how wide, long and of what rank the strategies of each layer are.

The paper of S4 says how many parameters there are in all, and whether they grow from layer to layer. It does not say
how a layer's parameters are divided among its strategies, nor what becomes of BitFit, whose number of parameters is
what it is. Here

- each layer gets a share of the budget; one whose strategies take more than that at their smallest gets just these,
  one that has BitFit alone gets BitFit, and the other layers share what is left;
- inside a layer, the strategies that have a size divide equally, in parameters, what is left behind those that are
  fixed (all of BitFit, the output bias of an adapter);
- what rounding to whole sizes leaves over goes to the next strategy, and from the last one to the next layer.
"""

from collections.abc import Mapping, Sequence

from hf_peft_ext.tuners.s4.costs import Costs

TOLERANCE = 0.05


class OutOfReach(ValueError):
    """No sizes come near to a budget."""


def solve(
    costs: Costs, assigned: Mapping[int, Sequence[str]], shares: Mapping[int, float], budget: float
) -> dict[int, dict[str, int]]:
    """Layer -> strategy -> its size.

    Args:
        costs: of the strategies in the model.
        assigned: layer -> its strategies.
        shares: layer -> what it gets, in any unit.
        budget: all parameters, as a share of the base model's.

    Raises:
        OutOfReach: the sizes that come nearest are more than 5 % away from the budget; the message says how near.
    """
    there = {layer: [s for s in strategies if layer in costs.of[s]] for layer, strategies in assigned.items()}
    there = {layer: strategies for layer, strategies in there.items() if strategies}
    asked = budget * costs.parameters
    due = targets(costs, there, shares, asked)
    sizes: dict[int, dict[str, int]] = {}
    carried = 0.0
    for layer in sorted(there):
        sizes[layer] = layer_sizes(costs, layer, there[layer], due[layer] + carried)
        carried += due[layer] - costs.parameters_at(layer, sizes[layer])
    found = sum(costs.parameters_at(layer, of) for layer, of in sizes.items())
    if abs(found - asked) > TOLERANCE * asked:
        raise OutOfReach(out_of_reach(costs, there, budget, found))
    return sizes


def targets(
    costs: Costs, there: Mapping[int, Sequence[str]], shares: Mapping[int, float], asked: float
) -> dict[int, float]:
    """Parameters due to each layer: by its share, but no less than its strategies take at their smallest."""
    smallest = {layer: costs.parameters_at(layer, dict.fromkeys(s, 1)) for layer, s in there.items()}
    growing = {layer for layer, s in there.items() if any(costs.of[name][layer].unit for name in s)}
    while growing:
        left = asked - sum(smallest[layer] for layer in smallest if layer not in growing)
        rate = left / sum(shares[layer] for layer in growing)
        short = {layer for layer in growing if rate * shares[layer] < smallest[layer]}
        if not short:
            return {layer: rate * shares[layer] if layer in growing else smallest[layer] for layer in smallest}
        growing -= short
    return dict(smallest)


def layer_sizes(costs: Costs, layer: int, strategies: Sequence[str], due: float) -> dict[str, int]:
    """The sizes of a layer's strategies; the coarsest first, so that the finest takes up what rounding leaves."""
    cost = {strategy: costs.of[strategy][layer] for strategy in strategies}
    left = due - sum(c.fixed for c in cost.values())
    sized = sorted((s for s in strategies if cost[s].unit), key=lambda s: -cost[s].unit)
    sizes = dict.fromkeys(strategies, 1)
    for i, strategy in enumerate(sized):
        sizes[strategy] = max(1, round(left / (len(sized) - i) / cost[strategy].unit))
        left -= sizes[strategy] * cost[strategy].unit
    return sizes


def out_of_reach(costs: Costs, there: Mapping[int, Sequence[str]], budget: float, found: int) -> str:
    """What to say of a budget that cannot be met."""
    asked, nearest = budget * costs.parameters, f"{found:,} parameters, a budget of {found / costs.parameters:.3g}"
    fixed = sum(cost.fixed for layer, s in there.items() for cost in (costs.of[name][layer] for name in s))
    said = f"`budget` (={budget}) is {asked:,.0f} of {costs.parameters:,} parameters, which these strategies cannot"
    if not any(costs.of[name][layer].unit for layer, s in there.items() for name in s):
        return f"{said} meet: BitFit has no size, and takes {nearest}."
    if found > asked:
        return f"{said} get down to: at their smallest they take {nearest} ({fixed:,} are biases, which have no size)."
    return f"{said} meet: the nearest is {nearest}."
