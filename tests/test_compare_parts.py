"""The parts of a comparison: statistics against scipy, sentences, sizes at a budget, rows, halving, measures."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import optuna
import pytest
import torch
from peft import get_peft_model
from scipy import stats
from transformers import AutoModelForSequenceClassification

from hf_peft_ext.compare.halving import HalvingByMethod, RungReports
from hf_peft_ext.compare.inference import adjusted, mean_interval, paired_test, verdict
from hf_peft_ext.compare.measures import StepMemory, tensor_bytes
from hf_peft_ext.compare.method_scores import MethodScores
from hf_peft_ext.compare.methods import COMPARED_METHODS, method_named
from hf_peft_ext.compare.recommend import listing, recommend
from hf_peft_ext.compare.retention import GENERAL_TEXT, read_texts, text_loss
from hf_peft_ext.compare.rows import ComparedRows
from hf_peft_ext.compare.runs import RATES
from hf_peft_ext.compare.settings import CompareArguments
from hf_peft_ext.compare.sizes import SizedMethod, check_budget, empty_model, parameters_of, size_methods
from hf_peft_ext.compare.summary import Summary, best_rates
from hf_peft_ext.recipes import Recipe
from hf_peft_ext.recipes.tasks import CONFIGS
from hf_peft_ext.search.run_record import Record, Run
from hf_peft_ext.search.search import adapter_parameters
from hf_peft_ext.tuners.s4.costs import base_parameters

from .backbones import BACKBONES
from .test_compare import write_recipe
from .test_training import tokenizer

# 2026-11: TRL's own default for an argument that transformers renames
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

# Statistics


def test_interval_and_paired_test():
    """Numbers that scipy's own calls give, on rows without the seed that only one method has."""
    lora, other = {1: 0.58, 2: 0.61, 3: 0.55, 4: 0.9}, {1: 0.63, 2: 0.64, 3: 0.62}
    low, high = mean_interval(list(other.values()))
    expected = stats.ttest_1samp(list(other.values()), 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    test = paired_test(other, lora)
    scipy = stats.ttest_rel([0.63, 0.64, 0.62], [0.58, 0.61, 0.55])
    assert test.p_value == pytest.approx(scipy.pvalue)
    assert test.difference == pytest.approx(0.05)
    assert (test.low, test.high) == pytest.approx(tuple(scipy.confidence_interval(0.95)))


def test_scores_without_spread():
    """Constant differences are no evidence, however large: few dev rows give few values."""
    test = paired_test({1: 0.6, 2: 0.7}, {1: 0.5, 2: 0.6})
    assert (test.difference, test.low, test.p_value) == (pytest.approx(0.1), None, None)
    assert verdict(test, None, True) == "tie"
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)
    assert mean_interval([0.5]) is None
    assert paired_test({1: 0.5}, {2: 0.5}) is None
    assert verdict(None, None, True) == "failed"


def test_adjusted_p_values():
    """Benjamini and Hochberg, over the methods that have a p-value."""
    p_values = {"a": 0.01, "b": None, "c": 0.04, "d": 0.5}
    corrected = adjusted(p_values)
    assert corrected["b"] is None
    assert [corrected[name] for name in "acd"] == pytest.approx([0.03, 0.06, 0.5])
    assert adjusted({"a": None}) == {"a": None}


def test_false_alarms_are_rare():
    """Six methods that equal the reference: in about 5 % of comparisons one of them is called better or worse."""
    generator, alarms = np.random.default_rng(0), 0
    for _ in range(200):
        scores = generator.normal(size=(7, 5))
        tests = {str(i): paired_test(dict(enumerate(scores[i])), dict(enumerate(scores[0]))) for i in range(1, 7)}
        corrected = adjusted({name: test.p_value for name, test in tests.items()})
        alarms += any(verdict(test, corrected[name], True) != "tie" for name, test in tests.items())
    assert alarms / 200 < 0.09


# The recommendation


def scores(name, verdict, mean=0.5, parameters=100, difference=0.0):
    values = dict.fromkeys(MethodScores.__dataclass_fields__)
    values |= {"name": name, "title": COMPARED_METHODS[name].title, "verdict": verdict, "mean": mean}
    values |= {"parameters": parameters, "difference": difference, "difference_interval": (0.01, 0.09)}
    return MethodScores(**{**values, "p_adjusted": 0.02, "scores": {1: mean, 2: mean}})


LORA = scores("lora", "reference")
SENTENCES = [
    (
        [LORA, scores("unipelt", "tie", 0.6, 200)],
        "lora",
        "No method is distinguishable from LoRA with these 100 rows; take LoRA, it is the smallest.",
    ),
    (
        [LORA, scores("unipelt", "tie", 0.6, 200), scores("bitfit", "tie", 0.4, 50), scores("ia3", "tie", 0.4, 20)],
        "lora",
        "No method is distinguishable from LoRA with these 100 rows; take LoRA ((IA)³ is smaller, and whether it is as"
        " good cannot be told).",
    ),
    (
        [LORA, scores("unipelt", "tie", 0.6, 200), scores("bitfit", "worse", 0.3, 50)],
        "lora",
        "No method is better than LoRA with these 100 rows (BitFit is worse); take LoRA, it is the smallest.",
    ),
    (
        [LORA, scores("mam", "tie", 0.6, 200), scores("bitfit", "worse", 0.3, 50), scores("ia3", "worse", 0.3, 50)],
        "lora",
        "No method is better than LoRA with these 100 rows (BitFit and (IA)³ are worse); take LoRA, it is the"
        " smallest.",
    ),
    (
        [LORA, scores("bitfit", "worse", 0.3, 50)],
        "lora",
        "Every other method is worse than LoRA with these 100 rows; take LoRA.",
    ),
    (
        [
            LORA,
            scores("mam", "better", 0.55, 200, 0.05),
            scores("full", "better", 0.54, 900),
            scores("s4", "tie", 0.9),
        ],
        "mam",
        "Take MAM: its accuracy on the dev rows is 0.550, LoRA's is 0.500, a difference of +0.050 (95 % interval"
        " +0.010 to +0.090, adjusted p = 0.020) over 2 seeds.",
    ),
    (
        [replace(LORA, mean=None, verdict="failed"), scores("mam", "failed", 0.55)],
        None,
        "LoRA has no scores, so nothing was compared with it, and there is no recommendation.",
    ),
    ([LORA, scores("mam", "failed", None)], None, "No method beside LoRA has scores, so there is no recommendation."),
]


@pytest.mark.parametrize(("methods", "winner", "sentence"), SENTENCES)
def test_recommendation(methods, winner, sentence):
    assert recommend(methods, "lora", "accuracy", True, 100) == (winner, sentence)


def test_recommendation_by_loss():
    """Of two better methods, the one with the lower loss."""
    methods = [LORA, scores("mam", "better", 0.3), scores("s4", "better", 0.2)]
    assert recommend(methods, "lora", "loss", False, 10)[0] == "s4"
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"


def test_note_on_rates_at_the_end():
    """A best rate that is the largest or smallest of three is noted; one in the middle, or one of two, is not."""

    def record(name, rate, score):
        run = Run(RATES, name, 0, 0, {"learning_rate": rate, "peft": {}})
        return Record(run, 0, "done", {"dev": score})

    records = [record("lora", rate, rate) for rate in (1, 2, 3)]
    records += [record("mam", rate, -abs(rate - 2)) for rate in (1, 2, 3)]
    records += [record("s4", rate, rate) for rate in (1, 2)]
    methods = {name: SizedMethod(COMPARED_METHODS[name], {}, None, 1e-3) for name in ("lora", "mam", "s4")}
    rates = best_rates(records)
    assert rates == {"lora": 3, "mam": 2, "s4": 2}
    summary = Summary(methods, "lora", "accuracy", rates, records, {"train": 9, "dev": 3}, {}, [], Path())
    end = "at the end of those tried; others (`--rates`) may be better"
    assert summary.rate_notes() == [f"The best learning rate is {end}: LoRA."]
    assert "no scores" in summary.result().recommendation


# Sizes


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Recipes on a tiny BERT and a tiny Llama of six layers, the fewest that S4 divides."""
    found = {}
    for name, task in (("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM")):
        folder = tmp_path_factory.mktemp(name)
        BACKBONES[name].build(num_hidden_layers=6).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        text = {} if name == "bert" else {"data": "{{data_files: {file}, text_column: text, split_column: split}}"}
        found[name] = Recipe.read(write_recipe(folder, folder, task, **text))
    return found


def sized(recipe, *names, budget=None):
    methods = {name: method_named(name, recipe.written["peft"]) for name in names}
    labels = ["a", "b"] if recipe.peft.task_type == "SEQ_CLS" else []
    return size_methods(methods, budget, recipe.peft.task_type, lambda: empty_model(recipe, labels))


SIZABLE = [name for name, method in COMPARED_METHODS.items() if method.takes_budget]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("method", SIZABLE)
def test_budget(name, method, recipes):
    """Each method that has a size comes within 5 % of a budget, counted on a model with weights."""
    recipe, budget = recipes[name], 3840 if method == "shira" else 7680  # which has fewer than the smallest matrix
    found = sized(recipe, method, budget=budget)[method]
    fields = {key: value for key, value in found.config.items() if key != "peft_type"}
    config = CONFIGS[found.config["peft_type"]](task_type=recipe.peft.task_type, **fields)
    model = recipe.task.model.from_pretrained(recipe.model.model_name_or_path)
    assert adapter_parameters(get_peft_model(model, config)) == found.parameters
    assert found.parameters == pytest.approx(budget, rel=0.05)


OF_PEFT = ["lora", "dora", "adalora", "krona", "vera", "fourierft", "oft", "boft", "ln_tuning", "beft", "ia3"]


@pytest.mark.parametrize("name", ["distilbert", "modernbert", "albert"])
def test_models_that_peft_has_no_names_for(name):
    """Methods of peft take the modules that they are for, on models that are missing in peft's tables."""

    def make_model():
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(BACKBONES[name].build().config)

    methods = {method: COMPARED_METHODS[method] for method in OF_PEFT}
    sizes = size_methods(methods, None, "SEQ_CLS", make_model)
    assert all(sizes[method].parameters for method in OF_PEFT)
    budget = 2 * sizes["lora"].parameters
    found = size_methods({"lora": COMPARED_METHODS["lora"]}, budget, "SEQ_CLS", make_model)["lora"]
    assert found.parameters == pytest.approx(budget, rel=0.05)
    assert found.config["r"] == 16


def test_proportions_at_a_budget(recipes):
    """UniPELT's sub-layers keep about the proportions of their usual sizes, and LoRA its scaling."""
    config = sized(recipes["bert"], "unipelt", budget=20_000)["unipelt"].config
    assert config["bottleneck_size"] / config["r"] == pytest.approx(6, rel=0.2)
    assert config["num_virtual_tokens"] / config["r"] == pytest.approx(1.25, rel=0.2)
    assert config["lora_alpha"] == 2 * config["r"]
    assert isinstance(config["lora_alpha"], int)


def test_fixed_sizes(recipes):
    """They are the same with and without a budget."""
    names = [name for name in COMPARED_METHODS if name not in SIZABLE]
    free, bound = sized(recipes["bert"], *names), sized(recipes["bert"], *names, budget="10%")
    assert {name: found.config for name, found in free.items()} == {
        name: found.config for name, found in bound.items()
    }
    model = recipes["bert"].task.model.from_pretrained(recipes["bert"].model.model_name_or_path)
    assert free["full"].parameters == base_parameters(model)
    assert free["none"].parameters == 0


def test_own_fields_of_the_recipe():
    """They count for the recipe's own method; modules to save count for all."""
    peft = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 4, "modules_to_save": ["x"]}
    assert method_named("lora", peft).config == {
        "peft_type": "LORA", "r": 4, "lora_alpha": 4, "modules_to_save": ["x"]
    }  # fmt: skip
    assert method_named("mam", peft).config == {"peft_type": "MAM", "modules_to_save": ["x"]}
    assert method_named("none", peft).config["target_modules"] == "dummy-target-modules"


def test_budgets():
    for budget in ("0.5%", "1200", 1200, None):
        check_budget(budget)
    for budget in ("0.5", 0.5, "101%", "x%", -3, True, "nan"):
        with pytest.raises(ValueError, match=r"`budget` \(=.*\) must be a share of the base model"):
            check_budget(budget)
    assert parameters_of("0.5%", 10_000) == 50
    assert parameters_of("70", 10_000) == 70


def test_methods_that_cannot_be_compared(recipes):
    """A method without a site, or that trains nothing, is an error before anything is trained."""
    with pytest.raises(ValueError, match=r"`methods` \(='none'\) trains nothing: this model has no head\."):
        sized(recipes["llama"], "none")
    with pytest.raises(ValueError, match=r"`methods` \(='s4'\).*`budget` \(=.*\) is 20 of"):
        sized(recipes["bert"], "s4", budget=20)


# Rows


def test_held_out_rows():
    """Each seed holds out other rows, with the shares of the classes; nothing is in both parts."""
    data = datasets.Dataset.from_dict({"n": list(range(40)), "label": ["a"] * 30 + ["b"] * 10})
    rows = ComparedRows(data, None, ["a", "b"], "label", 0.2)
    parts = [rows.of(seed) for seed in (0, 1, 0)]
    for train, dev, _ in parts:
        assert sorted(train["n"][:] + dev["n"][:]) == list(range(40))
        assert Counter(dev["label"]) == {"a": 6, "b": 2}
    assert parts[0][1]["n"][:] == parts[2][1]["n"][:] != parts[1][1]["n"][:]
    few = ComparedRows(data.select(range(31)), None, ["a", "b"], "label", 0.2)  # one row of class b
    assert len(few.of(0)[1]) == 6


# Halving


def trial_of(study, stage, method, model):
    study.enqueue_trial({}, user_attrs={"run": {"stage": stage, "constraint": method, "model": model}})
    return study.ask()


def test_halving_is_among_the_rates_of_a_method():
    """A rate goes on if it is the best of its method so far; other methods and stages do not compete."""
    study = optuna.create_study(direction="maximize", pruner=HalvingByMethod())
    stopped = {}
    for method, model, score in [("a", 0, 0.5), ("b", 0, 0.1), ("a", 1, 0.4), ("a", 2, 0.6), ("b", 1, 0.2)]:
        trial = trial_of(study, "rates", method, model)
        trial.report(score, 1)
        stopped[method, model] = trial.should_prune()
    assert [key for key, stop in stopped.items() if stop] == [("a", 1)]
    nan = trial_of(study, "rates", "a", 3)
    nan.report(math.nan, 1)
    assert nan.should_prune()


@pytest.mark.parametrize(("rates", "steps"), [(2, [40]), (3, [40]), (9, [14, 40])])
def test_rungs(rates, steps):
    """With three rates, one evaluation after a third of the steps; with nine also after a ninth."""
    reports = RungReports(None, rates, "accuracy")
    asked = []
    for step in range(1, 121):
        control = SimpleNamespace(should_evaluate=False)
        reports.on_step_end(None, SimpleNamespace(global_step=step, max_steps=120), control)
        asked += [step] if control.should_evaluate else []
    assert asked == steps


# Measures


def test_step_memory():
    """The peak of a step: the parameters, their gradients, and the largest tensors that live at once."""
    layer = torch.nn.Linear(256, 256, bias=False)
    memory, args = StepMemory(layer), SimpleNamespace(device=torch.device("cpu"))
    for _ in range(2):  # the second time, the profiler's counter begins above zero
        memory.on_step_begin(args, SimpleNamespace(global_step=0, max_steps=1), None)
        layer(torch.ones(1024, 256)).square().sum().backward()
        memory.on_step_end(args, SimpleNamespace(global_step=1, max_steps=1), None)
        layer.zero_grad()
        tensor = 1024 * 256 * 4
        assert tensor_bytes(layer) == 256 * 256 * 4
        assert 3 * tensor < memory.peak < 6 * tensor
        memory.peak = None


def test_retention():
    """The loss of all tokens together, and errors of the texts."""
    model, words = BACKBONES["llama"].build(), tokenizer()
    texts = ["w1 w2 w3 w4", "w5 w6", "w7"]
    losses = []
    for text in texts[:2]:
        ids = words(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    assert text_loss(model, words, texts) == pytest.approx(np.mean(losses), rel=1e-5)
    with pytest.raises(ValueError, match=r"`general_text` \(='w7'\) must hold texts of at least two tokens\."):
        text_loss(model, words, ["w7"])


def test_texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one\n\n two \n")
    assert read_texts(file) == ["one", "two"]
    assert read_texts(None) == list(GENERAL_TEXT)
    with pytest.raises(ValueError, match=r"`general_text` \(='none\.txt'\) must be a file with a text on each line\."):
        read_texts("none.txt")
    with pytest.raises(ValueError, match=r"`general_text` \(='\[\]'\) must hold at least one text\."):
        read_texts([])


def test_arguments(tmp_path):
    """The rest of the rules; test_compare.py has those that the command meets."""
    for wrong, rule in {
        "methods": ("lora", "must be a list of names, not a single string"),
        "rates": ([1, 1], "must hold a factor once"),
        "dev_share": (1, "must lie between 0 and 1"),
        "heartbeat": (0, "must be a positive whole number"),
    }.items():
        with pytest.raises(ValueError, match=rf"`{wrong}` \(=.*\) {rule[1]}\."):
            CompareArguments(output_dir=tmp_path, **{wrong: rule[0]})
