"""S4: groups against all ways to cut a stack, sizes against the budget and against what `get_peft_model` builds, the
saved config against the one that was solved.
"""

import itertools
import json
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from hf_peft_ext import S4Config, UniPELTConfig, load_adapter
from hf_peft_ext.model.layer_groups import (
    ALLOCATIONS,
    GROUPINGS,
    group_sizes,
    layer_groups,
    layer_shares,
    proportions,
    relations,
    ways,
)
from hf_peft_ext.tuners.s4 import config as s4
from hf_peft_ext.tuners.s4.costs import STRATEGIES, Cost, Costs, all_placed, base_parameters, sizes_in
from hf_peft_ext.tuners.s4.layout import layout_of
from hf_peft_ext.tuners.s4.solve import OutOfReach, layer_targets, solve

from .backbones import BACKBONES

BASES = {
    "bert": lambda: AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert")),
    "gpt2": lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2")),
    "t5": lambda: AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    ),
}


@pytest.fixture(scope="module")
def base():
    """Models of the size of BERT-base, without data."""
    made = {}

    def build(name):
        if name not in made:
            with torch.device("meta"):
                made[name] = BASES[name]()
        return made[name]

    return build


@pytest.fixture(scope="module")
def costs(base):
    """Their costs, which take longer than what is solved from them."""
    return cache(lambda name: S4Config()._costs(base(name)))


def bert(layers=4):
    return BACKBONES["bert"].build(num_hidden_layers=layers)


# Groups


def keeps_to(sizes, grouping):
    pairs = zip(sizes, relations(grouping, len(sizes)), sizes[1:], strict=False)
    return all({"<": a < b, "=": a == b, ">": a > b}[relation] for a, relation, b in pairs)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5])
def test_ways_to_group(grouping, groups):
    """All ways are found, and no other; the default is the nearest to the proportions."""
    for layers in range(1, 15):
        cuts = ((0, *cut, layers) for cut in itertools.combinations(range(1, layers), groups - 1))
        every = (tuple(b - a for a, b in itertools.pairwise(cut)) for cut in cuts)
        expected = {sizes for sizes in every if keeps_to(sizes, grouping)}
        assert set(ways(grouping, layers, groups)) == expected
        if expected and groups <= layers:
            shares = proportions(grouping, groups)
            parts = [layers * share / sum(shares) for share in shares]

            def apart(sizes, parts=parts):
                return round(sum((a - b) ** 2 for a, b in zip(sizes, parts, strict=True)), 6)

            assert apart(group_sizes(grouping, layers, groups)) == min(map(apart, expected))


def test_relations_are_the_papers():
    assert {grouping: relations(grouping, 4) for grouping in GROUPINGS} == {
        "increasing": ("<", "<", "<"),
        "uniform": ("=", "=", "="),
        "decreasing": (">", ">", ">"),
        "spindle": ("<", "=", ">"),
        "bottleneck": (">", "=", "<"),
    }


def test_sizes_of_spindles():
    """The paper's example, 3/9/9/3 of 24 layers; the same shape for the other models of the paper, and MiniLM."""
    for layers, sizes in {24: (3, 9, 9, 3), 12: (2, 4, 4, 2), 48: (6, 18, 18, 6), 6: (1, 2, 2, 1)}.items():
        assert group_sizes("spindle", layers, 4) == sizes


def test_t5_as_one_stack_and_as_two(base):
    """One stack: the border of G2 and G3 is that of encoder and decoder. Two: each has its own four groups."""
    groups = [group.layers for group in S4Config().layout(base("t5")).groups]
    assert groups == [list(range(3)), list(range(3, 12)), list(range(12, 21)), list(range(21, 24))]
    groups = [group.layers for group in S4Config(stack="separate").layout(base("t5")).groups]
    assert groups == layer_groups([range(12), range(12, 24)], [(2, 4, 4, 2)] * 2)
    assert groups[0] == [0, 1, 12, 13]


def test_layers_that_are_grouped():
    """`layers_to_transform` are the layers that make up the stack; the others are left alone."""
    model = get_peft_model(bert(6), S4Config(layers_to_transform=[1, 2, 3, 5], grouping="uniform", budget=0.2))
    config = model.peft_config["default"]
    assert config.groups == [[1], [2], [3], [5]]
    assert sorted(sizes_in(config.placements)) == [1, 2, 3, 5]


# Budgets


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("budget", [0.002, 0.005, 0.02])
def test_budget_is_met(base, costs, name, allocation, budget):
    """Within 5 % of the budget on models of the size of BERT-base."""
    config = S4Config(budget=budget, allocation=allocation)._solved(costs(name))
    found = layout_of(config.groups, config.placements, costs(name))
    assert found.share == pytest.approx(budget, rel=0.05)
    assert found.base_parameters == base(name).num_parameters()


@pytest.mark.parametrize("name", BASES)
def test_layout_counts_what_is_built(base, name):
    """The parameters in the table are those of the adapter, group by group; each layer has the group's strategies."""
    with torch.device("meta"):
        model = get_peft_model(BASES[name](), S4Config())
    layout = model.peft_config["default"].layout(model)
    trained = {n: p.numel() for n, p in model.named_parameters() if "sublayer_of" in n}
    assert layout.parameters == sum(trained.values())
    assert layout.share == pytest.approx(0.005, rel=0.05)
    assert [list(group.sizes) for group in layout.groups] == [
        ["adapter", "lora"],
        ["adapter", "prefix"],
        ["adapter", "prefix", "bitfit"],
        ["prefix", "bitfit", "lora"],
    ]
    if name == "bert":
        for group in layout.groups:
            inside = [size for n, size in trained.items() if int(re.search(r"layer\.(\d+)\.", n)[1]) in group.layers]
            assert group.parameters == sum(inside)


def test_allocation(costs):
    """Uniform: each layer has a twelfth, up to a unit; increasing: from a half to one and a half of it."""
    units = 3072
    for allocation in ALLOCATIONS:
        found = costs("bert")
        sizes = sizes_in(S4Config(budget=0.02, allocation=allocation)._solved(found).placements)
        asked = 0.02 * found.parameters / 12
        for layer, share in enumerate(layer_shares(allocation, 12)):
            assert abs(found.parameters_at(layer, sizes[layer]) - share * asked) <= units
    assert layer_shares("increasing", 3) == [0.5, 1.0, 1.5]
    assert layer_shares("decreasing", 1) == [1.0]


def test_a_layer_is_divided_equally(costs):
    """The strategies of a layer that have a size get the same number of parameters, up to a unit of LoRA's."""
    found = costs("bert")
    for layer, of in sizes_in(S4Config(budget=0.02)._solved(found).placements).items():
        parts = [of[s] * found.of[s][layer].unit for s in of if s != "bitfit"]
        assert max(parts) - min(parts) <= 3 * 3072


def test_budgets_out_of_reach(base):
    """The error names what is reachable, and a budget of that is met."""
    with pytest.raises(OutOfReach, match=r"at their smallest they take 101,386 parameters, a budget of 0.000926"):
        S4Config(budget=0.0005).layout(base("bert"))
    assert S4Config(budget=0.000926).layout(base("bert")).parameters == 101_386
    biases = S4Config(strategies=[["bitfit"]] * 4, budget=0.005)
    with pytest.raises(OutOfReach, match=r"BitFit has no size, and takes 101,376 parameters, a budget of 0.000926"):
        biases.layout(base("bert"))
    assert S4Config(strategies=[["bitfit"]] * 4, budget=0.000926).layout(base("bert")).parameters == 101_376


@st.composite
def problems(draw):
    """Some layers with strategies, costs, shares and a budget."""
    layers = range(draw(st.integers(1, 6)))
    of = {
        "adapter": {i: Cost(draw(st.integers(1, 50)), draw(st.integers(1, 90))) for i in layers},
        "prefix": {i: Cost(0, draw(st.integers(1, 90))) for i in layers if i % 5 != 3},  # a layer without attention
        "bitfit": {i: Cost(draw(st.integers(1, 300)), 0) for i in layers},
        "lora": {i: Cost(0, draw(st.integers(1, 90))) for i in layers},
    }
    names = st.lists(st.sampled_from(STRATEGIES), min_size=1, max_size=4, unique=True)
    assigned = {i: draw(names) for i in layers if draw(st.booleans()) or i == 0}
    shares = {i: draw(st.floats(0.01, 1)) for i in layers}
    return Costs(100_000, [list(layers)], of), assigned, shares, draw(st.floats(0.0005, 0.2))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_solver(problem):
    """Never further from the budget than half a unit, but where the smallest sizes are too many or nothing grows; no
    layer gets less than its share by more than a unit; all sizes are whole and positive.
    """
    costs, assigned, shares, budget = problem
    there = {i: [s for s in names if i in costs.of[s]] for i, names in assigned.items()}
    there = {i: names for i, names in there.items() if names}
    asked = budget * costs.parameters
    smallest = sum(costs.parameters_at(i, dict.fromkeys(names, 1)) for i, names in there.items())
    units = [costs.of[s][i].unit for i, names in there.items() for s in names]
    try:
        sizes = solve(costs, assigned, shares, budget)
    except OutOfReach:
        assert smallest > 1.05 * asked or not any(units) or max(units) / 2 > 0.05 * asked
        return
    found = {i: costs.parameters_at(i, of) for i, of in sizes.items()}
    assert {i: sorted(of) for i, of in sizes.items()} == {i: sorted(names) for i, names in there.items()}
    assert all(type(size) is int and size > 0 for of in sizes.values() for size in of.values())
    assert abs(sum(found.values()) - asked) <= 0.05 * asked
    due = layer_targets(costs, there, shares, asked)
    assert all(abs(found[i] - due[i]) <= max(units) for i in found)
    assert sizes_in(all_placed(sizes)) == sizes


def test_base_parameters():
    """As transformers counts; the adapters on a model, ours, peft's or a saved head, are no part of it."""
    for name in ("bert", "t5", "gpt2"):
        fresh = BACKBONES[name].build()
        count = fresh.num_parameters()
        assert base_parameters(fresh) == count
        assert base_parameters(get_peft_model(fresh, UniPELTConfig()).get_base_model()) == count
    model = AutoModelForSequenceClassification.from_config(bert().config)
    count = model.num_parameters()
    lora = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "dense"]))
    assert base_parameters(lora.get_base_model()) == count


def test_base_parameters_in_four_bits(tmp_path):
    """A quantised model has the parameters that it had."""
    pytest.importorskip("bitsandbytes")
    whole = BACKBONES["bert"].build(hidden_size=64, intermediate_size=128)
    whole.save_pretrained(tmp_path)
    four_bit = type(whole).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert base_parameters(four_bit) == whole.num_parameters()


def test_explicit_sizes():
    config = S4Config(bottleneck_size=3, r=2, num_virtual_tokens=5)
    sizes = sizes_in(get_peft_model(bert(8), config).peft_config["default"].placements)
    assert sizes[0] == {"adapter": 3, "lora": 2}
    assert sizes[7] == {"prefix": 5, "bitfit": 1, "lora": 2}


def test_tunable_groups():
    """Only these are tuned, and the budget is theirs."""
    model = bert(8)
    layout = S4Config(tunable_groups=[2, 4], budget=0.1).layout(model)
    assert [bool(group.sizes) for group in layout.groups] == [False, True, False, True]
    assert layout.share == pytest.approx(0.1, rel=0.05)
    assert layout.groups[0].strategies == "-"


def test_prints_as_a_table(base):
    """The same to `print` and to rich: the groups, their layers, strategies and sizes, and parameters."""
    lines = str(S4Config().layout(base("bert"))).splitlines()
    assert lines[3].split("│")[1:-1] == [" G1    ", " 0 to 1   ", lines[3].split("│")[3], "     90,654 "]
    assert "adapter (r 15), lora (r 7)" in lines[3]
    assert "0.500% of 109,483,778" in lines[-2]
    assert "546,952" in lines[-2]


# Configs


def test_what_is_saved_is_solved(tmp_path, monkeypatch):
    """The file holds groups and placements; loading, safe loading too, solves nothing, and is equal to the bit."""
    config = S4Config(budget=0.1)
    model = get_peft_model(bert(8), config)
    other, alone = (get_peft_model(bert(10), c).peft_config["default"] for c in (config, S4Config(budget=0.1)))
    assert (other.groups, other.placements) == (alone.groups, alone.placements)  # it can be used for another model
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["groups"] == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert stored["placements"][0]["layers"]
    monkeypatch.setattr(s4, "costs_of", None)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for again in (PeftModel.from_pretrained(bert(8), tmp_path), load_adapter(bert(8), tmp_path)):
        loaded = {n.replace(".default", ""): p for n, p in again.named_parameters() if "sublayer_of" in n}
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_safe_load_holds_the_file_to_its_config(tmp_path):
    """Weights of other sizes than the config says are refused."""
    get_peft_model(bert(8), S4Config(budget=0.1)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    stored["placements"][0]["options"]["r"] += 1
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="shape"):
        load_adapter(bert(8), tmp_path)


INVALID = [
    (lambda: S4Config(grouping="spiral"), "`grouping` (='spiral') must be one of increasing, uniform,"),
    (lambda: S4Config(grouping=[1, 2]), "`grouping` (=[1, 2]) must hold the sizes of 4 groups"),
    (lambda: S4Config(grouping=[1, 2, 0, 3]), "`grouping` (=0) must be a positive whole number."),
    (lambda: S4Config(num_groups=3), "`num_groups` (=3) must be the number of groups in `strategies`, which is 4."),
    (lambda: S4Config(stack="both"), "`stack` (='both') must be one of joint, separate."),
    (lambda: S4Config(allocation="spindle"), "`allocation` (='spindle') must be one of increasing, uniform,"),
    (lambda: S4Config(tunable_groups=[0]), "`tunable_groups` (=[0]) must hold numbers from 1 to 4, each once."),
    (lambda: S4Config(tunable_groups=[]), "`tunable_groups` (=[]) must hold numbers from 1 to 4, each once."),
    (lambda: S4Config(tunable_groups=[2, 2]), "`tunable_groups` (=[2, 2]) must hold numbers from 1 to 4, each once."),
    (lambda: S4Config(strategies="adapter"), "`strategies` (='adapter') must be a list for each group."),
    (lambda: S4Config(strategies=["adapter"]), "`strategies` (='adapter') must be a list of names"),
    (lambda: S4Config(strategies=[["ia3"]]), "`strategies` (=['ia3']) must hold adapter, prefix, bitfit, lora only."),
    (lambda: S4Config(strategies=[]), "`strategies` (=[]) must hold at least one group."),
    (lambda: S4Config(budget=0), "`budget` (=0) must be a share of the base model's parameters, between 0 and 1."),
    (lambda: S4Config(budget=0.1, r=8), "`budget` (=0.1) must be None where sizes are given"),
    (lambda: S4Config(r=8), "`bottleneck_size` (=None) must be given, as `r` is, or else `budget` alone."),
    (lambda: S4Config(r=0), "`r` (=0) must be a positive whole number."),
    (
        lambda: S4Config(strategies=[["lora"]], r=8, allocation="increasing"),
        "`allocation` (='increasing') must be \"uniform\" where sizes are given",
    ),
    (lambda: S4Config(groups=[[0]]), "`placements` (=None) must be given together with `groups`, or neither"),
    (lambda: S4Config(target_modules=["query"]), "`target_modules` (=['query']) must be None: LoRA sits on queries"),
]


@pytest.mark.parametrize(("make", "message"), INVALID, ids=range(len(INVALID)))
def test_invalid_configs(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


MISFITS = [
    (lambda: S4Config(), 3, "`num_groups` (=4) must be at most the number of layers, which is 3."),
    (lambda: S4Config(grouping="uniform"), 6, "`grouping` (='uniform') has no 4 groups of 6 layers with N1 = N2 = N3"),
    (
        lambda: S4Config(),
        7,
        "`grouping` (='spindle') has no 4 groups of 7 layers with N1 < N2 = N3 > N4; take another",
    ),
    (lambda: S4Config(grouping=[1, 1, 1, 1]), 6, "`grouping` (=[1, 1, 1, 1]) must add up to the number of layers"),
    (lambda: S4Config(layers_to_transform=[0, 9]), 6, "`layers_to_transform` (=[0, 9]) names layer 9, which does not"),
]


@pytest.mark.parametrize(("make", "layers", "message"), MISFITS, ids=range(len(MISFITS)))
def test_models_that_do_not_fit(make, layers, message):
    """The error comes before the model is touched."""
    model = bert(layers)
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, make())
    assert not any("sublayer" in name for name, _ in model.named_modules())


def test_too_many_ways():
    with pytest.raises(ValueError, match=re.escape("`num_groups` (=10) groups 128 layers in more than 100000 ways")):
        group_sizes("increasing", 128, 10)
