"""The design spaces of S4, from S0 to S4: their decisions, the constraints of each stage, and random models.

Chen et al. 2023 (https://arxiv.org/abs/2301.01821), sections 3 and 4. S0 contains every model: each layer is tuned
with probability 0.5, with random strategies and numbers of parameters. Each stage compares constraints of one kind, on
models sampled under them, and keeps the best constraint:

1. grouping: layers form groups that share their strategies; how do the sizes of the groups compare?
2. allocation: does the number of parameters grow, stay or fall from layer to layer?
3. tunable groups: which groups are tuned?
4. strategies: those of the first tuned group, then those of the next, and so on, one stage each.

Later decisions are drawn at random. Every model meets the same budget. The paper leaves three points open. Here, from
stage 1 on, a group is tuned as a whole, with probability 0.5. Its size is drawn from all sizes that fit the grouping.
`hf_peft_ext.tuners.s4.solve` divides a layer's parameters between its strategies.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any, get_args

from torch import nn

from hf_peft_ext.attach.config import ComposedConfig
from hf_peft_ext.model.layer_groups import (
    ALLOCATIONS,
    GROUPINGS,
    group_sizes,
    layer_groups,
    layer_shares,
    relations,
    ways,
)
from hf_peft_ext.tuners.s4.config import S4Config
from hf_peft_ext.tuners.s4.costs import STRATEGIES, Costs, Stack, all_placed, costs_of
from hf_peft_ext.tuners.s4.solve import OutOfReach, solve
from hf_peft_ext.validation.checks import check, check_count, check_names, is_number

ANY = "any"  # the one constraint of S0
SPACE_STAGES = ("S0", "S1 grouping", "S2 allocation", "S3 tunable groups")  # and S4, a stage for each tuned group
TRIES = 1000  # draws until a model meets the budget


@dataclass(frozen=True)
class DesignSpace:
    """A space of models, narrowed by the decisions so far. `DesignSpace.of` creates S0.

    Args:
        costs: numbers of parameters of the strategies in the base model.
        budget: parameters of each model, as a share of the base model's.
        num_groups: number of groups of layers.
        strategies: the strategies that a layer may have.
        stack: "joint" groups encoder and decoder as one stack, "separate" each by itself.
        fields: further fields of the sampled configs.
        winners: the constraint that won each stage, from S0 on.
    """

    costs: Costs
    budget: float
    num_groups: int = 4
    strategies: Sequence[str] = STRATEGIES
    stack: Stack = "joint"
    fields: Mapping[str, Any] = field(default_factory=dict)
    winners: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        budget: float = 0.001,
        num_groups: int = 4,
        strategies: Sequence[str] = STRATEGIES,
        stack: Stack = "joint",
        **fields: Any,
    ) -> "DesignSpace":
        """S0 for a base model, which is not changed.

        Args:
            model: the base model.
            budget: parameters of each model, as a share of the base model's.
            num_groups: number of groups of layers.
            strategies: the strategies that a layer may have.
            stack: "joint" groups encoder and decoder as one stack, "separate" each by itself.
            fields: further fields of the sampled configs, such as `task_type`, `modules_to_save` or `sites`.

        Raises:
            ValueError: a value breaks a rule, or a strategy has no site in the model.
        """
        check_count("num_groups", num_groups)
        share = is_number(budget) and 0 < budget < 1
        check("budget", budget, share, "must be a share of the base model's parameters, between 0 and 1")
        check("stack", stack, stack in get_args(Stack), f"must be one of {', '.join(get_args(Stack))}")
        names = check_names("strategies", strategies, STRATEGIES)
        return cls(costs_of(model, names, **fields), budget, num_groups, tuple(names), stack, fields)

    @property
    def stage(self) -> str:
        """The next decision, such as "S1 grouping" or "S4 strategies of G2"; "S4" at the end."""
        if len(self.winners) < len(SPACE_STAGES):
            return SPACE_STAGES[len(self.winners)]
        return "S4" if self.finished else f"S4 strategies of G{self._open_group}"

    @property
    def finished(self) -> bool:
        """Whether everything is decided."""
        return len(self.winners) >= len(SPACE_STAGES) and self._open_group is None

    # Decisions

    @property
    def grouping(self) -> Any:
        """The grouping, or None if it is undecided."""
        return self.winners[1] if len(self.winners) > 1 else None

    @property
    def allocation(self) -> Any:
        """The allocation, or None if it is undecided."""
        return self.winners[2] if len(self.winners) > 2 else None

    @property
    def tunable_groups(self) -> list[int] | None:
        """The groups that are tuned, numbered from 1 as in the paper, or None if they are undecided."""
        return [int(name[1:]) for name in self.winners[3].split("+")] if len(self.winners) > 3 else None

    @property
    def assigned(self) -> dict[int, list[str]]:
        """Group -> its strategies, for the groups that are decided."""
        return {
            group: names.split("+") for group, names in zip(self.tunable_groups or [], self.winners[4:], strict=False)
        }

    @property
    def _open_group(self) -> int | None:
        return next((group for group in self.tunable_groups or [] if group not in self.assigned), None)

    # Stages

    def constraints(self) -> list[str]:
        """The constraints of this stage that some model meets."""
        return [name for name in self._all_constraints() if name not in self.left_out]

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Constraint -> why no model meets it, with these layers and this budget."""
        reasons: dict[str, str] = {}
        for name in self._all_constraints():
            try:
                self.sample(name, 1)
            except ValueError as error:
                reasons[name] = str(error)
        return reasons

    def _all_constraints(self) -> list[str]:
        """The paper's constraints; those on tunable groups are each group alone, the first k and the last k groups."""
        distinct = {relations(grouping, self.num_groups): grouping for grouping in reversed(GROUPINGS)}.values()
        groupings = [grouping for grouping in GROUPINGS if grouping in distinct]  # two groups: a spindle is uniform
        stages = ([ANY], groupings, list(ALLOCATIONS), tunable(self.num_groups))
        if len(self.winners) < len(stages):
            return stages[len(self.winners)]
        return [] if self.finished else ["+".join(names) for names in subsets(self.strategies)]

    def narrow(self, winner: str) -> "DesignSpace":
        """The space of the next stage, in which every model meets `winner`.

        Raises:
            ValueError: it is not a constraint of this stage.
        """
        choices = self._all_constraints()
        rule = f"must be a constraint of {self.stage}: {', '.join(choices) or 'none'}"
        check("winner", winner, winner in choices, rule)
        return replace(self, winners=(*self.winners, winner))

    def config(self) -> S4Config:
        """The space as a method: its decisions, and the defaults of S4 for the others."""
        decided = {"grouping": self.grouping, "allocation": self.allocation, "tunable_groups": self.tunable_groups}
        decided = {name: value for name, value in decided.items() if value is not None}
        defaults = [list(names) for names in S4Config.strategies] if self.num_groups == 4 else None
        every = defaults or [list(self.strategies)] * self.num_groups
        strategies = [self.assigned.get(i, names) for i, names in enumerate(every, 1)]
        return S4Config(strategies=strategies, stack=self.stack, budget=self.budget, **decided, **self.fields)

    # Samples

    def sample(self, constraint: str, n: int, seed: int = 0) -> list[ComposedConfig]:
        """Draw models that meet a constraint.

        Args:
            constraint: one of `constraints()`.
            n: number of models; a larger n gives the same models and further ones.
            seed: seed of the draw.

        Raises:
            ValueError: it is not a constraint of this stage, or no model meets it.
        """
        narrowed = self.narrow(constraint)
        return [narrowed._draw(random.Random(f"{seed} {narrowed.winners} {i}")) for i in range(n)]

    def _draw(self, rng: random.Random) -> ComposedConfig:
        reason: OutOfReach | None = None
        for _ in range(TRIES):
            assigned, shares = self._assigned(rng), self._shares(rng)
            try:
                sizes = solve(self.costs, assigned, shares, self.budget)
            except OutOfReach as error:
                reason = error
            else:
                return ComposedConfig(placements=all_placed(sizes), **self.fields)
        raise ValueError(f"None of {TRIES} random models meets the budget. The last one: {reason}") from reason

    def _assigned(self, rng: random.Random) -> dict[int, Sequence[str]]:
        """Layer -> its strategies, for the tuned layers."""
        stacks, choices = self.costs.grouped_stacks(self.stack), subsets(self.strategies)
        if self.grouping is None:
            layers = [layer for stack in stacks for layer in stack]
            return {layer: rng.choice(choices) for layer in some(layers, rng)}
        for stack in stacks:
            group_sizes(self.grouping, len(stack), self.num_groups)  # raises if the grouping has no sizes
        sizes = [rng.choice(ways(self.grouping, len(stack), self.num_groups)) for stack in stacks]
        groups = layer_groups(stacks, sizes)
        tuned = self.tunable_groups or some(range(1, self.num_groups + 1), rng)
        drawn = {i: self.assigned.get(i) or rng.choice(choices) for i in tuned}
        return {layer: names for i, names in drawn.items() for layer in groups[i - 1]}

    def _shares(self, rng: random.Random) -> dict[int, float]:
        """Layer -> its share of the parameters."""
        shares: dict[int, float] = {}
        for stack in self.costs.grouped_stacks(self.stack):
            drawn = [1 - rng.random() for _ in stack]
            if self.allocation is not None:
                drawn = sorted(drawn, reverse=self.allocation == "decreasing")
            if self.allocation == "uniform":
                drawn = layer_shares("uniform", len(stack))
            shares |= dict(zip(stack, drawn, strict=True))
        return shares


def tunable(num_groups: int) -> list[str]:
    """The sets of groups that may be tuned, as names: "G1+G2"."""
    numbers = range(1, num_groups + 1)
    runs = {(i,) for i in numbers} | {(*numbers[:i],) for i in numbers} | {(*numbers[i - 1 :],) for i in numbers}
    return ["+".join(f"G{i}" for i in run) for run in sorted(runs, key=lambda run: (len(run), run))]


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All non-empty subsets: 15 of four names."""
    return [subset for size in range(1, len(names) + 1) for subset in combinations(names, size)]


def some(items: Sequence[int], rng: random.Random) -> list[int]:
    """Each item with probability 0.5, at least one."""
    while True:
        if chosen := [item for item in items if rng.random() < 0.5]:
            return chosen
