"""The learning rate to begin with."""

import pytest
import torch
from peft import HRAConfig, IA3Config, LoraConfig

from hf_peft_ext import BottleneckConfig, MAMConfig, TFewConfig, UniPELTConfig, recommended_learning_rate
from hf_peft_ext.compare.methods import COMPARED_METHODS
from hf_peft_ext.compare.sizes import size_methods
from hf_peft_ext.recipes.tasks import CONFIGS
from hf_peft_ext.tuners.learning_rates import LEARNING_RATES

from .backbones import BACKBONES
from .methods import ALL


@pytest.mark.parametrize("name", ALL)
def test_every_method_has_one(name):
    if name in ("composed", "intervention"):
        pytest.skip("its sub-layers are the user's")
    assert 1e-5 < recommended_learning_rate(ALL[name](task_type="SEQ_CLS")) < 1


def test_the_same_as_in_compare():
    """A comparison has the same rate for each type."""
    for name, method in COMPARED_METHODS.items():
        if name not in ("full", "none"):  # no adapter
            assert method.learning_rate == LEARNING_RATES[method.config["peft_type"]], name


@pytest.mark.parametrize("budget", [None, "20%"])
def test_the_same_as_in_compare_at_each_size(budget):
    """A comparison begins at the rate that a user is told, also for the sizes that a budget gives."""
    names = ("lora", "mam", "unipelt", "houlsby", "pfeiffer") + (() if budget else ("adamix", "compacter", "ia3"))
    sized = size_methods({name: COMPARED_METHODS[name] for name in names}, budget, "CAUSAL_LM", meta_llama)
    if budget is None:
        assert sized["mam"].learning_rate < sized["mam"].method.learning_rate
    for name, method in sized.items():
        fields = {key: value for key, value in method.config.items() if key != "peft_type"}
        config = CONFIGS[method.config["peft_type"]](task_type="CAUSAL_LM", **fields)
        assert recommended_learning_rate(config, hidden_size=32) == method.learning_rate, name


def meta_llama():
    with torch.device("meta"):
        return BACKBONES["llama"].build()


WIDE = {
    "MAM": (MAMConfig(), 0.3 / (4 * 512)),
    "narrow MAM": (MAMConfig(bottleneck_size=16), 2e-3),
    "parallel": (BottleneckConfig(style="parallel"), 0.3 / 512),
    "scaled parallel": (BottleneckConfig(style="scaled_parallel"), 0.3 / 2048),
    "scaling": (BottleneckConfig(style="houlsby", r=64, scaling=10), 0.3 / 640),
    "negative": (BottleneckConfig(style="houlsby", r=64, scaling=-10.0), 0.3 / 640),
    "learned": (BottleneckConfig(style="houlsby", r=300, scaling="learned"), 1e-3),
    "pruned": (BottleneckConfig(style="pfeiffer", r=600, sparsity=0.75, pruning="random"), 2e-3),
    "none": (BottleneckConfig(style="houlsby", r=64, scaling=0.0), 4e-3),
    "UniPELT": (UniPELTConfig(bottleneck_size=600), 5e-4),
    "UniPELT without": (UniPELTConfig(methods=("prefix", "lora"), bottleneck_size=600), 4e-3),
    "LoRA": (LoraConfig(r=512, lora_alpha=1024), 4e-3),
}


@pytest.mark.parametrize("case", WIDE)
def test_wide_bottlenecks(case):
    """Rate times scaling times width is 0.3 at most; at 1 and more, MAM and its like did not learn at all."""
    config, rate = WIDE[case]
    assert recommended_learning_rate(config) == pytest.approx(rate)


def test_reduction_factors():
    """Their width is known with the model's."""
    config = BottleneckConfig(style="pfeiffer", reduction_factor=16)
    assert recommended_learning_rate(config) == recommended_learning_rate(config, hidden_size=768) == 4e-3
    assert recommended_learning_rate(config, hidden_size=4096) == pytest.approx(0.3 / 256)


def test_by_type():
    """peft's own configs have one too; types without one are refused."""
    assert recommended_learning_rate(LoraConfig()) > 0
    assert recommended_learning_rate(TFewConfig()) == recommended_learning_rate(IA3Config())
    with pytest.raises(ValueError, match=r"`peft_type` \(='HRA'\) must be one of LORA, ADALORA, .*; no rate"):
        recommended_learning_rate(HRAConfig())
