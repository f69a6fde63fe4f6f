"""S4: layers in groups, each group with strategies of its own, their sizes solved from a budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from torch import nn

from hf_peft_ext.attach.changed_config import asked_by, become
from hf_peft_ext.attach.config import InitConfig, PlacedConfig
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.model.layer_groups import (
    ALLOCATIONS,
    GROUPINGS,
    Allocation,
    Grouping,
    group_sizes,
    layer_groups,
    layer_shares,
)
from hf_peft_ext.tuners.s4.costs import STRATEGIES, Costs, Stack, all_placed, costs_of
from hf_peft_ext.tuners.s4.layout import Layout, layout_of
from hf_peft_ext.tuners.s4.solve import solve
from hf_peft_ext.validation.checks import check, check_count, check_names, is_number

DESIGN = (("adapter", "lora"), ("adapter", "prefix"), ("adapter", "prefix", "bitfit"), ("prefix", "bitfit", "lora"))
BUDGET = 0.005
EXPLICIT = {"adapter": "bottleneck_size", "prefix": "num_virtual_tokens", "lora": "r"}
# the fields that choose the sites
FIELDS = ("sites", "exclude_modules", "modules_to_save", "layers_to_transform")


@dataclass
class S4Config(InitConfig, PlacedConfig):
    """The result of a search over design spaces: layers in four groups, each with its own sub-layers.

    The first group has adapters and LoRA, the second adapters and prefixes, the third adapters, prefixes and BitFit,
    the last prefixes, BitFit and LoRA.

    Chen et al. 2023 (https://arxiv.org/abs/2301.01821), sections 3 and 4; the budget is that of its final comparison,
    0.5 % of the base model. The adapter is Pfeiffer's (`BottleneckConfig`), the prefix sits inside attention, LoRA on
    queries and values with alpha = 2 r, BitFit on the biases of the layers. The paper does not give the sizes of the
    groups (`model.layer_groups.group_sizes`) and the division of the budget (`tuners.s4.solve`).

    The untrained adapter is the base model: up-projections start at zero, and a prefix has a softmax of its own.
    `init="paper"` has Pfeiffer's up-projections and puts the prefix in front of the keys.

    `groups` and `placements` are solved when the config is attached to a model. They are saved with the adapter, so
    loading solves nothing.

    Args:
        grouping: how the sizes of the groups compare: "increasing", "uniform", "decreasing", "spindle" (small at both
            ends), "bottleneck" (large at both ends); or the sizes.
        num_groups: number of groups; None for as many as `strategies` has.
        stack: "joint": encoder and decoder are one stack, as in the paper; "separate": each is grouped by itself, and
            a group holds a part of both.
        allocation: change of the number of parameters from layer to layer: "uniform", "increasing", "decreasing".
        tunable_groups: numbers of the groups that are tuned, from 1 as in the paper; None for all.
        strategies: for each group, which of "adapter", "prefix", "bitfit", "lora".
        budget: parameters of the adapter, without heads, as a share of the base model's; 0.005 unless sizes are given.
        bottleneck_size, r, num_virtual_tokens: the sizes of adapters, LoRA and prefixes in all layers, in place of a
            budget.
        groups: solved: the layers of each group.
        placements: solved: the sub-layers.

    Raises:
        ValueError: a value breaks a rule; on a model: the model has no such groups, a strategy has no site, or no
            sizes come within 5 % of the budget.
    """

    method = "s4"

    grouping: Grouping | list[int] = field(default="spindle", metadata={"help": "Pattern of groups, or their sizes."})
    num_groups: int | None = field(default=None, metadata={"help": "Number of groups."})
    stack: Stack = field(default="joint", metadata={"help": "Encoder and decoder as one stack, or each by itself."})
    allocation: Allocation = field(default="uniform", metadata={"help": "Parameters from layer to layer."})
    tunable_groups: list[int] | None = field(default=None, metadata={"help": "Groups that are tuned, from 1."})
    strategies: Sequence[Sequence[str]] = field(default=DESIGN, metadata={"help": "The strategies of each group."})
    budget: float | None = field(default=None, metadata={"help": "Share of the base model's parameters."})
    bottleneck_size: int | None = field(default=None, metadata={"help": "Width of adapters, in place of a budget."})
    r: int | None = field(default=None, metadata={"help": "Rank of LoRA, in place of a budget."})
    num_virtual_tokens: int | None = field(default=None, metadata={"help": "Prefix vectors, in place of a budget."})
    groups: list[list[int]] | None = field(default=None, metadata={"help": "Solved: the layers of each group."})
    placements: list[Placement] | None = field(default=None, metadata={"help": "Solved: the sub-layers."})

    def __post_init__(self) -> None:
        self._check_strategies()
        self._check_groups()
        self._check_budget()
        solved = self.placements is not None and self.groups is not None
        rule = "must be given together with `groups`, or neither: both are solved on the model"
        check("placements", self.placements, solved or self.placements is self.groups, rule)
        if solved:
            self.placements = [Placement.of(p) for p in self.placements or []]
            rule = f"must hold the layers of {len(self.strategies)} groups"
            check("groups", self.groups, len(self.groups or []) == len(self.strategies), rule)
        rule = "must be None: LoRA sits on queries and values; `sites` says where those are"
        check("target_modules", self.target_modules, not self.target_modules, rule)
        super().__post_init__()

    def _check_strategies(self) -> None:
        check("strategies", self.strategies, not isinstance(self.strategies, str), "must be a list for each group")
        self.strategies = [check_names("strategies", names, STRATEGIES) for names in self.strategies]
        check("strategies", self.strategies, bool(self.strategies), "must hold at least one group")
        if self.num_groups is not None:
            rule = f"must be the number of groups in `strategies`, which is {len(self.strategies)}"
            check("num_groups", self.num_groups, self.num_groups == len(self.strategies), rule)

    def _check_groups(self) -> None:
        n = len(self.strategies)
        if not isinstance(self.grouping, str):
            self.grouping = list(self.grouping)
            for size in self.grouping:
                check_count("grouping", size)
            rule = f"must hold the sizes of {n} groups, as many as `strategies` has"
            check("grouping", self.grouping, len(self.grouping) == n, rule)
        else:
            rule = f"must be one of {', '.join(GROUPINGS)}, or the sizes of the groups"
            check("grouping", self.grouping, self.grouping in GROUPINGS, rule)
        stacks = get_args(Stack)
        check("stack", self.stack, self.stack in stacks, f"must be one of {', '.join(stacks)}")
        rule = f"must be one of {', '.join(ALLOCATIONS)}"
        check("allocation", self.allocation, self.allocation in ALLOCATIONS, rule)
        if self.tunable_groups is not None:
            self.tunable_groups = sorted(self.tunable_groups)
            exist = bool(self.tunable_groups) and {*self.tunable_groups} <= {*range(1, n + 1)}
            once = len({*self.tunable_groups}) == len(self.tunable_groups)
            check("tunable_groups", self.tunable_groups, exist and once, f"must hold numbers from 1 to {n}, each once")

    def _check_budget(self) -> None:
        sizes = {s: getattr(self, name) for s, name in EXPLICIT.items()}
        explicit = [strategy for strategy, size in sizes.items() if size is not None]
        used = {s for number in self.tuned for s in self.strategies[number - 1]}
        if not explicit:
            self.budget = BUDGET if self.budget is None else self.budget
            share = is_number(self.budget) and 0 < float(self.budget) < 1
            check("budget", self.budget, share, "must be a share of the base model's parameters, between 0 and 1")
            return
        rule = "must be None where sizes are given, from which it follows"
        check("budget", self.budget, self.budget is None, rule)
        rule = 'must be "uniform" where sizes are given, which are those of all layers'
        check("allocation", self.allocation, self.allocation == "uniform", rule)
        for strategy in explicit:
            check_count(EXPLICIT[strategy], sizes[strategy])
        for strategy in (s for s in sizes if s in used):
            rule = f"must be given, as `{EXPLICIT[explicit[0]]}` is, or else `budget` alone"
            check(EXPLICIT[strategy], sizes[strategy], sizes[strategy] is not None, rule)

    @property
    def tuned(self) -> list[int]:
        """The numbers of the groups that are tuned."""
        return self.tunable_groups or list(range(1, len(self.strategies) + 1))

    def to_placements(self) -> list[Placement]:
        """The solved placements; empty before the config is on a model."""
        return self.placements or []

    def resolved(self, model: nn.Module) -> "S4Config":
        """Solve the config in place, since peft keeps the object that it was given.

        A config that another model uses already is copied first.

        Args:
            model: the base model.

        Raises:
            ValueError: the model has no such groups, a strategy has no site, or no sizes come near the budget.
        """
        original = asked_by(self)
        if original is None and self.placements is not None:
            return self
        heads = self.modules_to_save and list(self.modules_to_save)  # peft adds to the list
        unsolved = replace(original or self, modules_to_save=heads, inference_mode=self.inference_mode)
        solved = unsolved._solved(unsolved._costs(model))
        if original is not None:
            return solved
        become(self, solved, unsolved)
        return self

    def _solved(self, costs: Costs) -> "S4Config":
        stacks = costs.grouped_stacks(self.stack)
        groups = layer_groups(stacks, [group_sizes(self.grouping, len(s), len(self.strategies)) for s in stacks])
        assigned = {layer: self.strategies[n - 1] for n in self.tuned for layer in groups[n - 1]}
        if self.budget is None:
            size = {"bitfit": 1, **{s: getattr(self, name) for s, name in EXPLICIT.items()}}
            sizes = {layer: {s: size[s] for s in names if layer in costs.of[s]} for layer, names in assigned.items()}
        else:
            shares = [share for stack in stacks for share in layer_shares(self.allocation, len(stack))]
            layers = [layer for stack in stacks for layer in stack]
            sizes = solve(costs, assigned, dict(zip(layers, shares, strict=True)), self.budget)
        return replace(self, groups=groups, placements=all_placed(sizes, self.init))

    def layout(self, model: nn.Module) -> Layout:
        """The groups of this config on a model: their layers, strategies, sizes and parameters, as a table.

        Args:
            model: the base model, or the model with its adapter; it is not changed.

        Raises:
            ValueError: as `resolved`.
        """
        costs = self._costs(model)
        config = self if self.placements is not None else self._solved(costs)
        return layout_of(config.groups or [], config.to_placements(), costs)

    def _costs(self, model: nn.Module) -> Costs:
        used = {s for number in self.tuned for s in self.strategies[number - 1]}
        fields: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        return costs_of(model, [s for s in STRATEGIES if s in used], **fields)
