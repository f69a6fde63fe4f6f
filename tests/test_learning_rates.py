"""The learning rate to begin with."""

import pytest
from peft import HRAConfig, IA3Config, LoraConfig

from hf_peft_ext import TFewConfig, recommended_learning_rate
from hf_peft_ext.compare.methods import COMPARED_METHODS
from hf_peft_ext.recipes.tasks import CONFIGS

from .methods import ALL


@pytest.mark.parametrize("name", ALL)
def test_every_method_has_one(name):
    if name == "composed":
        pytest.skip("its sub-layers are the user's")
    assert 1e-5 < recommended_learning_rate(ALL[name](task_type="SEQ_CLS")) < 1


def test_the_same_as_in_compare():
    """A comparison begins at the rate that a user is told."""
    for name, method in COMPARED_METHODS.items():
        if name in ("full", "none"):  # no adapter
            continue
        fields = {key: value for key, value in method.config.items() if key != "peft_type"}
        config = CONFIGS[method.config["peft_type"]](task_type="CAUSAL_LM", **fields)
        assert recommended_learning_rate(config) == method.learning_rate, name


def test_by_type():
    """peft's own configs have one too; types without one are refused."""
    assert recommended_learning_rate(LoraConfig()) > 0
    assert recommended_learning_rate(TFewConfig()) == recommended_learning_rate(IA3Config())
    with pytest.raises(ValueError, match=r"`peft_type` \(='HRA'\) must be one of LORA, ADALORA, .*; no rate"):
        recommended_learning_rate(HRAConfig())
