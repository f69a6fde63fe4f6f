"""Mixtures whose experts are one tensor: the methods that act on the whole block, LoRA on the experts' own tensors,
and errors for what acts inside of them.
"""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_peft_ext import (
    BottleneckConfig,
    ComposedConfig,
    Placement,
    TFewConfig,
    find_target_modules,
    find_target_parameters,
)
from hf_peft_ext.attach.tuner import tuner_layers

from .backbones import BACKBONES
from .methods import randomise

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": LOCAL,
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**ROUTED, "head_dim": 8},
    "olmoe": ROUTED,
    "granitemoe": LOCAL,
    "phimoe": LOCAL,
    "gpt_oss": {**LOCAL, "head_dim": 8},
}


def build(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **FAMILIES[family])).eval()


def logits(model):
    return model(input_ids=torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))).logits


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_at_the_experts(family, tmp_path):
    """peft's LoRA takes the parameters found: each expert gets branches, which act, train and are saved."""
    base, targets = build(family), find_target_parameters(build(family))
    with torch.no_grad():
        expected = logits(base)
    config = LoraConfig(target_modules=find_target_modules(base), target_parameters=targets, r=2)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model), expected)
    randomise(model)
    logits(model).square().mean().backward()
    branches = {name: p for name, p in trained(model).items() if "experts" in name or "sparse_moe" in name}
    assert len(branches) == 2 * 2 * 2  # A and B of two tensors in two layers
    assert all(p.grad is not None and p.grad.any() for p in branches.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(again), logits(model))
        assert (logits(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "style"), [*((f, "houlsby") for f in FAMILIES), ("mixtral", "pfeiffer"), ("mixtral", "parallel")]
)
def test_bottlenecks_at_the_whole_block(family, style):
    """One bottleneck reads the input or the output of all experts of a block, not of each."""
    base = build(family)
    with torch.no_grad():
        expected = logits(base)
    model = get_peft_model(base, BottleneckConfig(style=style, r=4)).eval()
    with torch.no_grad():
        assert torch.equal(logits(model), expected)
    randomise(model)
    logits(model).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained(model).values())
    hosts = {layer.site.host for layer in tuner_layers(model)}
    assert not any("experts" in host for host in hosts)


def test_the_block_as_a_whole_is_the_host():
    model = get_peft_model(build("mixtral"), BottleneckConfig(style="parallel", r=4))
    assert {layer.site.host for layer in tuner_layers(model)} == {f"model.layers.{i}.mlp" for i in (0, 1)}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "config",
    [TFewConfig(), ComposedConfig(placements=[Placement("low_rank", "ffn_output", options={"r": 2})])],
    ids=["tfew", "low_rank"],
)
def test_what_acts_inside_of_an_expert(family, config):
    """The error names what to take instead."""
    base = build(family)
    names = [name for name, _ in base.named_modules()]
    message = (
        "at `ffn_output`; leave it out or pass `sites=`. Its experts are one tensor: `find_target_parameters(model)`"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == names


def test_parameters_of_dense_layers_are_others():
    """DeepSeek's first layer is dense, and its shared expert is linear: neither is named."""
    model = BACKBONES["deepseek_v3"].build()
    (targets,) = [find_target_parameters(model)]
    named = [n for n, _ in model.named_parameters() if any(n.endswith(f".{target}") for target in targets)]
    assert named
    assert all(".mlp.experts." in name for name in named)
    with pytest.raises(ValueError, match="must have experts that are one tensor; none were found"):
        find_target_parameters(BACKBONES["llama"].build())
    with pytest.raises(ValueError, match="must be a model without adapters"):
        find_target_parameters(get_peft_model(model, LoraConfig(target_modules=["o_proj"])))
