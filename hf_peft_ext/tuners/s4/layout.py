"""A table of the groups of layers: their strategies, sizes and parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.tuners.s4.costs import SIZES, STRATEGIES, Costs, sizes_in
from hf_peft_ext.validation.suggestions import ranges


@dataclass(frozen=True)
class GroupLayout:
    """One group of layers.

    Args:
        layers: their indices.
        sizes: strategy -> its sizes in these layers; empty where the group is not tuned.
        parameters: number of parameters of the group's sub-layers.
    """

    layers: list[int]
    sizes: dict[str, list[int]]
    parameters: int

    @property
    def strategies(self) -> str:
        """Such as "adapter (r 7 to 8), bitfit"."""
        named = [f"{s} ({symbol(s)} {ranges(sizes)})" if s in SIZES else s for s, sizes in self.sizes.items()]
        return ", ".join(named) or "-"


@dataclass(frozen=True)
class Layout:
    """The groups of a model. Prints as a table, with `print` and with rich.

    Args:
        groups: in order.
        base_parameters: parameters of the base model.
    """

    groups: list[GroupLayout]
    base_parameters: int

    @property
    def parameters(self) -> int:
        """Number of parameters of all groups."""
        return sum(group.parameters for group in self.groups)

    @property
    def share(self) -> float:
        """The share of the base model's parameters: the budget after rounding."""
        return self.parameters / self.base_parameters

    def __rich__(self) -> Table:
        table = Table("group", "layers", "strategies", show_footer=True)
        table.columns[2].footer = f"{self.share:.3%} of {self.base_parameters:,}"
        table.add_column("parameters", f"{self.parameters:,}", justify="right")
        for number, group in enumerate(self.groups, 1):
            table.add_row(f"G{number}", ranges(group.layers), group.strategies, f"{group.parameters:,}")
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def symbol(strategy: str) -> str:
    """The name of a strategy's size in the table."""
    return {"prefix": "tokens"}.get(strategy, SIZES[strategy])


def layout_of(groups: Sequence[Sequence[int]], placements: Sequence[Placement], costs: Costs) -> Layout:
    """The layout of placements.

    Args:
        groups: the layers of each group.
        placements: the sub-layers.
        costs: the costs of their strategies.
    """
    sizes = sizes_in(placements)
    layouts: list[GroupLayout] = []
    for group in groups:
        there = {layer: sizes.get(layer, {}) for layer in group}
        strategies = [s for s in STRATEGIES if any(s in there[layer] for layer in group)]
        layouts.append(
            GroupLayout(
                layers=list(group),
                sizes={s: [there[layer][s] for layer in group if s in there[layer]] for s in strategies},
                parameters=sum(costs.parameters_at(layer, there[layer]) for layer in group),
            )
        )
    return Layout(layouts, costs.parameters)
