"""What the guide says of peft's QA-LoRA: its formula, where peft ignores it, and that it cannot be merged."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

from .backbones import BACKBONES

GROUP, D_IN, D_OUT, R, ALPHA = 4, 12, 6, 2, 6


@pytest.fixture
def layer():
    """peft's layer for GPTQ weights, around a plain weight, with an adapter that matters."""
    plain = nn.Linear(D_IN, D_OUT, bias=False)
    plain.qweight = plain.weight
    config = LoraConfig(r=R, lora_alpha=ALPHA, use_qalora=True, qalora_group_size=GROUP, init_lora_weights=True)
    layer = GPTQLoraLinear(plain, "default", config=config, r=R, lora_alpha=ALPHA)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def test_formula(layer):
    """y = W x + (alpha / r) B A (groups x the mean of x over each group), by a loop; A is narrower by the group."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    groups = D_IN // GROUP
    assert a.shape == (R, groups)
    x = torch.randn(3, 5, D_IN)
    pooled = torch.stack([x[..., i * GROUP : (i + 1) * GROUP].mean(-1) for i in range(groups)], -1)
    expected = x @ layer.get_base_layer().weight.T + ALPHA / R * groups * pooled @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)


def test_the_update_is_constant_in_each_group(layer):
    """The columns of the update are equal within a group, so that zero points could take it."""
    update = layer(torch.eye(D_IN)).T - layer.get_base_layer().weight  # (d_out, d_in)
    grouped = update.view(D_OUT, D_IN // GROUP, GROUP)
    torch.testing.assert_close(grouped, grouped[..., :1].expand_as(grouped))
    assert update.abs().max() > 0.1


def test_it_cannot_be_merged(layer):
    variant = layer.lora_variant["default"]
    for function in (variant.merge_safe, variant.merge_unsafe, variant.unmerge):
        with pytest.raises(NotImplementedError, match="QALoRA for GPTQ layers does not support"):
            function(layer, "default", layer.get_base_layer().weight)


def test_other_layers_ignore_it():
    """On a model that GPTQ has not quantized, `use_qalora` gives plain LoRA, without an error."""
    config = LoraConfig(r=R, target_modules=["q_proj"], use_qalora=True, qalora_group_size=GROUP)
    model = get_peft_model(BACKBONES["llama"].build(), config)
    found = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert found
    assert all(module.lora_A["default"].in_features == module.in_features for module in found)
    assert not any(module.lora_variant for module in found)
