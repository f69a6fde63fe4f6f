"""`target_modules` found by structure, for stock methods of peft."""

import re

import pytest
import torch
from peft import LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM

from hf_peft_ext import find_target_modules

from .backbones import BACKBONES, output


def adapted(model):
    """Paths of the modules that peft adapts."""
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft sets it for GPT-2
@pytest.mark.parametrize("name", BACKBONES)
def test_lora_takes_them(name):
    """A default LoRA on the modules found acts, trains, and reaches every layer that has attention or a mixer."""
    base = BACKBONES[name].build()
    targets = find_target_modules(base)
    inputs = BACKBONES[name].inputs()
    with torch.no_grad():
        expected = output(base, inputs)
    model = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    assert (output(model, inputs) - expected).abs().max() > 1e-6
    assert len(adapted(model)) >= 2


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("bert", ["query", "value"]),
        ("llama", ["q_proj", "v_proj"]),
        ("t5", ["q", "v"]),
        ("gpt2", ["c_attn"]),
    ],
)
def test_as_peft_has_them(name, targets):
    """Names as short as peft's own table has them."""
    assert find_target_modules(BACKBONES[name].build()) == targets


def test_sites_and_feedforward():
    """All projections of attention and of the feed-forward network; names that match no other module."""
    model = BACKBONES["bert"].build()
    found = find_target_modules(model, ("query", "key", "value", "attention_output"), feedforward=True)
    wanted = (
        r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.)?output\.dense|intermediate\.dense)"
    )
    paths = {name for name, _ in model.named_modules() if re.fullmatch(f"(bert\\.)?{wanted}", name)}
    prefix = "base_model.model."
    assert {
        name.removeprefix(prefix) for name in adapted(get_peft_model(model, LoraConfig(target_modules=found)))
    } == paths


@pytest.mark.parametrize("config", [LoHaConfig, lambda **kw: OFTConfig(oft_block_size=4, **kw)])
def test_other_methods(config):
    """Methods that have no default modules for a model type take them too."""
    model = BACKBONES["llama"].build()
    assert adapted(get_peft_model(model, config(target_modules=find_target_modules(model))))


def test_on_the_meta_device():
    """No weights are needed."""
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=50)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert find_target_modules(model) == ["q_proj", "v_proj"]


def test_errors():
    model = BACKBONES["llama"].build()
    with pytest.raises(ValueError, match=r"`sites` \(='q_proj'\) must be one of query, key, value, attention_output"):
        find_target_modules(model, ["q_proj"])
    with pytest.raises(ValueError, match=r"`sites` \(='query'\) must be a list of sites"):
        find_target_modules(model, "query")
    with pytest.raises(ValueError, match=r"`model` \(='Linear'\) must have linear layers at query, value"):
        find_target_modules(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`model` \(='PeftModel'\) must be a model without adapters"):
        find_target_modules(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
