"""The samplers of S0 to S4, against the rule of every constraint, the budget and all architectures of small spaces;
the comparison, against Welch's formula.
"""

import itertools
import math
import pickle
import re
from statistics import mean, variance

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from scipy.stats import t as student

from hf_peft_ext import S4Config
from hf_peft_ext.model.layer_groups import relations
from hf_peft_ext.search import DesignSpace, compare_constraints
from hf_peft_ext.tuners.s4.costs import STRATEGIES, Cost, Costs, sizes_in

from .backbones import BACKBONES

ALL = "G1+G2+G3+G4"
FOUND = (
    "any",
    "spindle",
    "uniform",
    ALL,
    "adapter+lora",
    "adapter+prefix",
    "adapter+prefix+bitfit",
    "prefix+bitfit+lora",
)
UNIT = 20  # of the coarsest strategy below


def costs(*stacks, parameters=1_000_000):
    """Stacks of so many layers in which an adapter costs 10 + 15 r, a prefix 11 n, LoRA 20 r, and BitFit 80."""
    numbers = iter(range(sum(stacks)))
    layers = [[next(numbers) for _ in range(n)] for n in stacks]
    each = {"adapter": Cost(10, 15), "prefix": Cost(0, 11), "bitfit": Cost(80, 0), "lora": Cost(0, UNIT)}
    return Costs(parameters, layers, {s: dict.fromkeys(range(sum(stacks)), cost) for s, cost in each.items()})


def groupings(layers, groups, grouping):
    """All cuts of the layers that keep to a pattern, each as the layers of its groups."""
    for cuts in itertools.combinations(range(1, layers), groups - 1):
        bounds = (0, *cuts, layers)
        sizes = [b - a for a, b in itertools.pairwise(bounds)]
        pairs = zip(sizes, relations(grouping, groups), sizes[1:], strict=False)
        if all({"<": a < b, "=": a == b, ">": a > b}[relation] for a, relation, b in pairs):
            yield [range(a, b) for a, b in itertools.pairwise(bounds)]


def strategies_of(config, layers):
    """Layer by layer, the strategies of a sampled model: its architecture, without sizes."""
    sizes = sizes_in(config.placements)
    return tuple(frozenset(sizes.get(layer, ())) for layer in range(layers))


# Every sample keeps to its constraints and to the budget


@st.composite
def stages(draw):
    """A space at any stage, narrowed by constraints drawn at random, in 8 or 12 layers."""
    layers = draw(st.sampled_from([8, 12]))
    space = DesignSpace(costs(layers), draw(st.sampled_from([0.005, 0.02])))
    for _ in range(draw(st.integers(0, 7))):
        if not space.finished:
            space = space.narrow(draw(st.sampled_from(space.constraints())))
    return layers, space


@settings(max_examples=12, deadline=None, derandomize=True)
@given(stages(), st.integers(0, 2**31))
def test_samples_keep_to_their_constraints(stage, seed):
    layers, space = stage
    for constraint in space.constraints()[:4]:
        narrowed = space.narrow(constraint)
        for config in space.sample(constraint, 2, seed):
            check_budget(narrowed, config)
            check_groups(narrowed, strategies_of(config, layers), layers)
            check_allocation(narrowed, config)


def check_budget(space, config):
    sizes = sizes_in(config.placements)
    found = sum(space.costs.parameters_at(layer, of) for layer, of in sizes.items())
    assert found == pytest.approx(space.budget * space.costs.parameters, rel=0.05)
    assert all(of[s] > 0 for of in sizes.values() for s in of)


def check_groups(space, architecture, layers):
    """Some grouping that keeps to the pattern explains the architecture, and tunes what is decided, as it is."""
    assert any(architecture)
    if space.grouping is None:
        return

    def explains(groups):
        alike = all(len({architecture[layer] for layer in group}) == 1 for group in groups)
        found = [architecture[group[0]] for group in groups]
        tuned = [number for number, names in enumerate(found, 1) if names]
        wanted = all(found[i - 1] == frozenset(names) for i, names in space.assigned.items())
        return alike and wanted and space.tunable_groups in (None, tuned)

    assert any(explains(groups) for groups in groupings(layers, 4, space.grouping))


def check_allocation(space, config):
    """From layer to layer the parameters go as they should, but for rounding, and for layers whose strategies are at
    their smallest, or are BitFit alone, which has no size.
    """
    sizes = sizes_in(config.placements)
    found = [
        count
        for layer, of in sorted(sizes.items())
        if (count := space.costs.parameters_at(layer, of))
        > space.costs.parameters_at(layer, dict.fromkeys(of, 1)) + UNIT
    ]
    for a, b in itertools.pairwise(found):
        if space.allocation in ("increasing", "uniform"):
            assert b >= a - 2 * UNIT
        if space.allocation in ("decreasing", "uniform"):
            assert b <= a + 2 * UNIT


def test_samples_are_what_is_built():
    """On a model: the parameters of the adapter are within 5 % of the budget, and it has the further fields."""
    base = BACKBONES["t5"].build(num_layers=4)
    count = base.num_parameters()
    space = DesignSpace.of(base, 0.05, task_type="SEQ_2_SEQ_LM")
    for constraint in space.narrow("any").constraints():
        (config,) = space.narrow("any").sample(constraint, 1)
        assert config.task_type == "SEQ_2_SEQ_LM"
        model = get_peft_model(base, config)
        built = sum(p.numel() for name, p in model.named_parameters() if "sublayer_of" in name)
        assert built == pytest.approx(0.05 * count, rel=0.05)
        base = model.unload()


# Every legal architecture can occur


def some_subsets(names):
    return [frozenset(c) for n in range(len(names) + 1) for c in itertools.combinations(names, n)]


def seen(space, constraint, layers, n):
    return {strategies_of(config, layers) for config in space.sample(constraint, n)}


def test_every_architecture_of_s0():
    """Two layers, three strategies: each has any set of them or none, but not both none; BitFit alone in all that is
    tuned cannot meet the budget.
    """
    space = DesignSpace(costs(2), 0.001, strategies=("adapter", "bitfit", "lora"))
    every = itertools.product(some_subsets(("adapter", "bitfit", "lora")), repeat=2)
    legal = {pair for pair in every if any(pair) and set().union(*pair) != {"bitfit"}}
    assert len(legal) == 60
    assert seen(space, "any", 2, 2000) == legal


@pytest.mark.parametrize(
    ("layers", "groups", "strategies", "n"), [(7, 2, ("adapter", "lora"), 1200), (8, 3, ("lora",), 500)]
)
def test_every_architecture_of_s1(layers, groups, strategies, n):
    """Every grouping of a pattern, every set of tuned groups, all their strategies, and nothing else."""
    space = DesignSpace(costs(layers), 0.002, groups, strategies).narrow("any")
    for grouping in space.constraints():
        legal = {
            tuple(names[i] for i, group in enumerate(cut) for _ in group)
            for cut in groupings(layers, groups, grouping)
            for names in itertools.product(some_subsets(strategies), repeat=groups)
            if any(names)
        }
        assert seen(space, grouping, layers, n) == legal


def test_every_architecture_of_s4():
    """With G1 and G2 tuned and G1 decided: every grouping, every set of strategies in G2, as long as it is open."""
    space = DesignSpace(costs(10), 0.002, strategies=("adapter", "lora"))
    for winner in ("any", "spindle", "increasing", "G1+G2", "lora"):
        space = space.narrow(winner)
    assert space.stage == "S4 strategies of G2"
    for names in ("adapter", "lora", "adapter+lora"):
        legal = {
            tuple(
                frozenset({1: ["lora"], 2: names.split("+")}.get(i, ()))
                for i, group in enumerate(groups, 1)
                for _ in group
            )
            for groups in groupings(10, 4, "spindle")
        }
        assert seen(space, names, 10, 200) == legal


def test_two_stacks():
    """Separate stacks are cut each by itself; a group is tuned alike in both."""
    space = DesignSpace(costs(6, 6), 0.01, stack="separate").narrow("any")
    assert space.constraints() == ["spindle", "bottleneck"]
    for config in space.sample("spindle", 20):
        found = strategies_of(config, 12)
        assert found[:6] == found[6:]
        assert found[1] == found[2]
        assert found[3] == found[4]


# Seeds


def test_same_seed_same_list():
    """A seed gives one list, whose start does not depend on its length; another seed gives another."""
    space = DesignSpace(costs(12), 0.005)
    for winner in FOUND:
        for constraint in space.constraints()[:3]:
            first = [config.to_dict() for config in space.sample(constraint, 8, 1)]
            copied = pickle.loads(pickle.dumps(space))
            assert [config.to_dict() for config in copied.sample(constraint, 5, 1)] == first[:5]
            if space.stage != "S4 strategies of G4":  # all is decided but the sizes of groups
                assert [config.to_dict() for config in space.sample(constraint, 8, 2)] != first
        space = space.narrow(winner)


def test_samples_of_a_version_stay():
    """What a seed has given once: a search that is resumed must draw the same again."""
    (config,) = DesignSpace(costs(4), 0.001, num_groups=2).narrow("any").sample("uniform", 1, seed=0)
    assert sizes_in(config.placements) == {
        **{0: {"bitfit": 1}, 1: {"bitfit": 1}},
        **{2: {"adapter": 14, "prefix": 19}, 3: {"adapter": 13, "prefix": 19}},
    }


# Stages


def test_the_papers_stages():
    """Narrowed by the paper's winners, the space is the default S4; the constraints of each stage are the paper's."""
    base = BACKBONES["bert"].build(num_hidden_layers=12)
    space = DesignSpace.of(base, 0.1, modules_to_save=["pooler"])
    tried = {}
    for winner in FOUND:
        tried[space.stage] = space.constraints()
        assert space.left_out == {}
        space = space.narrow(winner)
    assert tried["S1 grouping"] == ["increasing", "uniform", "decreasing", "spindle", "bottleneck"]
    assert tried["S2 allocation"] == ["increasing", "uniform", "decreasing"]
    assert tried["S3 tunable groups"] == [
        *("G1", "G2", "G3", "G4", "G1+G2", "G3+G4", "G1+G2+G3", "G2+G3+G4", "G1+G2+G3+G4"),
    ]
    assert len(tried["S4 strategies of G2"]) == 15
    assert space.finished
    assert space.stage == "S4"
    assert space.constraints() == []
    defaults = S4Config(budget=0.1, modules_to_save=["pooler"], tunable_groups=[1, 2, 3, 4])
    assert space.config().to_dict() == defaults.to_dict()
    assert get_peft_model(base, space.config()).peft_config["default"].groups[0] == [0, 1]


def test_config_before_the_end():
    """What is open is as in S4; with another number of groups, each has all strategies."""
    assert DesignSpace(costs(12), 0.005).narrow("any").narrow("bottleneck").config().grouping == "bottleneck"
    space = DesignSpace(costs(12), 0.005, num_groups=3, strategies=("adapter", "prefix"))
    assert space.config().strategies == [["adapter", "prefix"]] * 3


def test_only_tuned_groups_get_strategies():
    space = DesignSpace(costs(12), 0.005)
    for winner in ("any", "spindle", "uniform", "G3+G4"):
        space = space.narrow(winner)
    assert space.stage == "S4 strategies of G3"
    space = space.narrow("lora").narrow("prefix+bitfit")
    assert space.finished
    assert space.assigned == {3: ["lora"], 4: ["prefix", "bitfit"]}
    assert space.config().tunable_groups == [3, 4]
    assert space.config().strategies[2:] == [["lora"], ["prefix", "bitfit"]]


def test_what_cannot_be_is_left_out():
    """Patterns that six layers do not have, and strategies that a budget does not reach, each with its reason."""
    space = DesignSpace(costs(6), 0.001).narrow("any")
    assert space.constraints() == ["spindle", "bottleneck"]
    assert space.left_out.keys() == {"increasing", "uniform", "decreasing"}
    assert "has no 4 groups of 6 layers with N1 < N2 < N3 < N4" in space.left_out["increasing"]
    space = DesignSpace(costs(4), 0.0003)
    for winner in ("any", "uniform", "uniform", ALL, "bitfit", "bitfit", "bitfit"):
        space = space.narrow(winner)
    assert not any("bitfit" in constraint for constraint in space.constraints())
    assert len(space.constraints()) == 7
    assert "BitFit has no size" in space.left_out["bitfit"]
    assert "at their smallest" in space.left_out["prefix+bitfit"]


def test_two_groups_have_no_spindle():
    """It would be uniform."""
    space = DesignSpace(costs(6), 0.005, num_groups=2).narrow("any")
    assert space.constraints() == ["increasing", "uniform", "decreasing"]


INVALID = [
    ({"budget": 1.5}, "`budget` (=1.5) must be a share of the base model's parameters, between 0 and 1."),
    ({"num_groups": 0}, "`num_groups` (=0) must be a positive whole number."),
    ({"strategies": ["ia3"]}, f"`strategies` (=['ia3']) must hold {', '.join(STRATEGIES)} only."),
    ({"task_typ": "SEQ_CLS"}, "`task_typ` (='SEQ_CLS') is not a field of ComposedConfig; did you mean `task_type`?"),
    ({"stack": "both"}, "`stack` (='both') must be one of joint, separate."),
]


@pytest.mark.parametrize(("fields", "message"), INVALID, ids=range(len(INVALID)))
def test_errors(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        DesignSpace.of(BACKBONES["bert"].build(), **fields)


def test_narrow_by_what_is_no_constraint():
    with pytest.raises(ValueError, match=r"^`winner` \(='spindle'\) must be a constraint of S0: any\.$"):
        DesignSpace(costs(4), 0.01).narrow("spindle")


# Comparison


def by_hand(first, second):
    """Welch's t-test, from its formula."""
    a, b = variance(first) / len(first), variance(second) / len(second)
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    return 2 * student.sf(abs(mean(first) - mean(second)) / math.sqrt(a + b), freedom)


scores = st.lists(st.floats(0, 100).map(lambda score: round(score, 2)), min_size=2, max_size=9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from("abcde"), scores, min_size=2))
def test_comparison(found):
    """The winner has the highest mean; it is a tie unless Welch's test says otherwise at 0.05."""
    compared = compare_constraints(found)
    means = {name: mean(values) for name, values in found.items()}
    assert compared.means == pytest.approx(means)
    assert means[compared.winner] == max(means.values())
    assert means[compared.runner_up] == max(m for name, m in means.items() if name != compared.winner)
    pair = found[compared.winner], found[compared.runner_up]
    if any(len({*values}) > 1 for values in pair):
        assert compared.p_value == pytest.approx(by_hand(*pair), rel=1e-6, abs=1e-12)
        assert compared.tie == (compared.p_value >= 0.05)
    else:
        assert compared.p_value is None
        assert compared.tie


def test_a_clear_winner_and_a_tie():
    """The paper's choice for its second group is 78.30 against 78.25: no number of runs with such spreads tells them
    apart.
    """
    around = [-2.0, -1.0, 0.0, 1.0, 2.0]
    close = {"adapter+prefix": [78.30 + x for x in around], "all": [78.25 + x for x in around]}
    compared = compare_constraints(close)
    assert (compared.winner, compared.runner_up, compared.tie) == ("adapter+prefix", "all", True)
    assert compared.runs == {"adapter+prefix": 5, "all": 5}
    assert compared.spreads["all"] == pytest.approx(math.sqrt(2.5))
    clear = compare_constraints({"spindle": [73.3 + x for x in around], "decreasing": [60.0 + x for x in around]})
    assert not clear.tie
    assert clear.p_value < 1e-4


def test_runs_that_failed():
    """NaN is left out; a constraint without a run cannot win; one run has no spread, and decides nothing."""
    compared = compare_constraints({"a": [math.nan, 1.0], "b": [math.nan], "c": [0.5, 0.6, math.nan]})
    assert compared.winner == "a"
    assert compared.runs == {"a": 1, "b": 0, "c": 2}
    assert math.isnan(compared.means["b"])
    assert math.isnan(compared.spreads["a"])
    assert (compared.p_value, compared.tie) == (None, True)
    alone = compare_constraints({"any": [1.0, 2.0]})
    assert (alone.winner, alone.runner_up, alone.p_value, alone.tie) == ("any", None, None, False)
    with pytest.raises(ValueError, match="`scores`"):
        compare_constraints({"a": [math.nan]})
