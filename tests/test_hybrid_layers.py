"""Layers without softmax attention: hybrid models, Mamba and RWKV. Where each sub-layer lands, against lists made by
hand; that it trains, is saved and loaded, and generates with a cache as without one.
"""

import logging
import re

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_peft_ext import (
    BitFitConfig,
    BottleneckConfig,
    ComposedConfig,
    LayerPrefixConfig,
    MAMConfig,
    Placement,
    S4Config,
    UniPELTConfig,
)
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import layer_paths

from .backbones import HYBRIDS, output
from .methods import randomise

PURE = ("mamba", "mamba2", "rwkv")
ATTENTION = {"qwen3_5": [3], "falcon_h1": [0, 1, 2, 3], "nemotron_h": [2], **{name: [] for name in PURE}}
FFN = {"nemotron_h": [1, 3], "mamba": [], "mamba2": [], "zamba2": [1, 3]}
# family -> what stands for query and value in layer 0, and what follows its mixer
MIXERS = {
    "qwen3_next": ({"linear_attn.in_proj_qkvz"}, "linear_attn"),
    "qwen3_5": ({"linear_attn.in_proj_qkv"}, "linear_attn"),
    "bamba": ({"mamba.in_proj"}, "mamba"),
    "jamba": ({"mamba.in_proj"}, "mamba"),
    "kimi_linear": ({"self_attn.q_proj", "self_attn.v_proj"}, "self_attn"),
    "granite_hybrid": ({"mamba.in_proj"}, "mamba"),
    "lfm2": ({"conv.in_proj"}, "conv"),
    "falcon_h1": ({"self_attn.q_proj", "self_attn.v_proj"}, "self_attn.o_proj"),
    "nemotron_h": ({"mixer.in_proj"}, "mixer"),
    "recurrent_gemma": ({"temporal_block.linear_x"}, "temporal_block"),
    "zamba2": ({"mamba.in_proj"}, "mamba"),
    "mamba": ({"mixer.in_proj"}, "mixer"),
    "mamba2": ({"mixer.in_proj"}, "mixer"),
    "rwkv": ({"attention.receptance", "attention.value"}, "attention"),
}


def everywhere(family):
    return list(range(len(layer_paths(HYBRIDS[family].build()))))


def attention_layers(family):
    return ATTENTION.get(family, [1, 3])


def config_for(family, **kwargs):
    """UniPELT with all that the family can take."""
    methods = ["adapter", "lora"]
    methods += ["prefix"] * (family not in PURE)
    return UniPELTConfig(methods=[*methods, "bitfit"], bottleneck_size=4, num_virtual_tokens=3, r=2, **kwargs)


def tuned(family, config=None):
    model = get_peft_model(HYBRIDS[family].build(), config or config_for(family))
    randomise(model)
    return model.eval()


def layers_of(model, sublayer):
    layers = {layer.site.layer for layer in tuner_layers(model) if layer.name.endswith(sublayer)}
    return sorted(layers - {None})  # the norm behind the last block has a bias


@pytest.mark.parametrize("family", HYBRIDS)
def test_every_sublayer_is_in_its_layers(family):
    model = tuned(family)
    layers = everywhere(family)
    assert layers_of(model, "after_residual_bottleneck") == layers
    assert layers_of(model, "_prefix") == attention_layers(family)
    mixing = [layer for layer in layers if family != "nemotron_h" or layer not in FFN[family]]
    assert layers_of(model, "_low_rank") == mixing
    assert layers_of(model, "trained_bias") == layers


@pytest.mark.parametrize("family", HYBRIDS)
def test_leaves_of_a_mixer(family):
    model = tuned(family, UniPELTConfig(methods=("lora",), r=2))
    first = layer_paths(model.get_base_model())[0]
    leaves, mixer = MIXERS[family]
    assert {layer.site.host for layer in tuner_layers(model) if layer.site.layer == 0} == {
        f"{first}.{x}" for x in leaves
    }
    sites = {site.name: site for site in find_sites(HYBRIDS[family].build()) if site.layer == 0}
    assert sites["after_attention"].host == f"{first}.{mixer}"


@pytest.mark.parametrize("family", [family for family in HYBRIDS if family not in ("mamba", "mamba2")])
def test_bottlenecks_of_an_ffn(family):
    """After and beside the FFN, wherever there is one; MAM's prefixes where attention is."""
    ffn = FFN.get(family, everywhere(family))
    assert layers_of(tuned(family, BottleneckConfig(style="houlsby", r=4)), "after_ffn_bottleneck") == ffn
    if family not in PURE:
        model = tuned(family, MAMConfig(bottleneck_size=4, num_virtual_tokens=3))
        assert layers_of(model, "parallel_ffn_bottleneck") == ffn
        assert layers_of(model, "_prefix") == attention_layers(family)


@pytest.mark.parametrize("family", HYBRIDS)
def test_trains_everywhere(family):
    """Each parameter of the adapter has a gradient, and the base model is itself again when it is disabled."""
    backbone = HYBRIDS[family]
    model, inputs = tuned(family), backbone.inputs()
    output(model.train(), inputs).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle
    with torch.no_grad(), model.eval().disable_adapter():
        torch.testing.assert_close(output(model, inputs), output(backbone.build(), inputs))


@pytest.mark.parametrize("family", HYBRIDS)
def test_saved_and_loaded(family, tmp_path):
    model, inputs = tuned(family), HYBRIDS[family].inputs()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(HYBRIDS[family].build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output(again, inputs), output(model, inputs))


@pytest.mark.parametrize("family", [family for family in HYBRIDS if family != "rwkv"])
def test_generates_with_a_cache(family):
    model, ids = tuned(family), HYBRIDS[family].inputs(2, 6)["input_ids"]
    wanted = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    base = HYBRIDS[family].build()
    gaps = []
    for each in (base, model):
        logits = [torch.stack(each.generate(input_ids=ids, use_cache=c, **wanted).logits) for c in (True, False)]
        gaps.append((logits[0] - logits[1]).abs().max().item())
    assert gaps[1] <= max(1e-3, 10 * gaps[0])


def test_a_low_rank_branch_on_what_stands_for_the_query():
    """One branch, whole, on the input projection, however many roles it stands for: y + s B A x."""
    model = tuned("bamba", UniPELTConfig(methods=("lora",), gated=False, r=2, layers_to_transform=0))
    (layer,) = tuner_layers(model)
    branch, x = layer.sublayer_of["default"], torch.randn(2, 5, 32)
    host = model.get_base_model().get_submodule(layer.site.host)
    weight = host.weight + branch.delta_weight()
    torch.testing.assert_close(host(x), torch.nn.functional.linear(x, weight, host.bias))


def test_layers_out_of_reach_are_logged(caplog):
    with caplog.at_level(logging.WARNING, "hf_peft_ext"):
        tuned("qwen3_5", MAMConfig(bottleneck_size=4))
    assert caplog.messages == ["`prefix` at `attention` has no place in layers 0 to 2 of 4; the others have it."]
    caplog.clear()
    tuned("qwen3_5", BottleneckConfig(style="houlsby", r=4))
    tuned("qwen3_5", MAMConfig(bottleneck_size=4, layers_to_transform=[3]))
    assert not caplog.messages


def test_s4_on_a_hybrid_model(caplog):
    """Its budget counts what is there: prefixes where attention is."""
    config = S4Config(grouping="uniform", num_groups=2, strategies=[("adapter", "prefix")] * 2, budget=0.05)
    model = tuned("qwen3_5", config)
    assert layers_of(model, "_prefix") == [3]
    assert layers_of(model, "after_residual_bottleneck") == [0, 1, 2, 3]
    assert len(caplog.messages) <= 1


@pytest.mark.parametrize("family", ["bamba", "rwkv", "qwen3_next"])
def test_means_need_attention(family):
    """A gate that takes means reads the padding from the mask of attention."""
    model = HYBRIDS[family].build()
    message = "cannot take means at .*, which lies in no block with attention; use 'token'"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, UniPELTConfig(methods=("adapter",), gate_pooling="mean"))
    assert not tuner_layers(model)


@pytest.mark.parametrize("family", PURE)
def test_prefixes_need_attention(family):
    name = HYBRIDS[family].model_type
    message = f"Architecture '{name}' has no attention blocks in which `prefix` could be placed; leave it out"
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(HYBRIDS[family].build(), LayerPrefixConfig())


@pytest.mark.parametrize("family", HYBRIDS)
def test_leaves_that_are_never_called_are_no_sites(family):
    """Mamba's kernel reads `dt_proj.weight` itself; a block of Zamba2 has adapters for all layers, and runs one."""
    model = tuned(family, BitFitConfig())
    hosts = {layer.site.host for layer in tuner_layers(model)}
    assert hosts
    assert not any(host.endswith("dt_proj") or "_adapter_list." in host for host in hosts)
    called = set()
    for layer in tuner_layers(model):
        layer.host.register_forward_hook(lambda host, *_: called.add(host))
    with torch.no_grad():
        output(model, HYBRIDS[family].inputs())
    assert called == {layer.host for layer in tuner_layers(model)}


def test_a_site_of_ones_own():
    """`mixer_input` can be named, and is what a branch at the query means where there is no query."""
    configs = [ComposedConfig(placements=[Placement("low_rank", site)]) for site in ("mixer_input", "query", "key")]
    hosts = [[layer.site.host for layer in tuner_layers(tuned("mamba", config))] for config in configs]
    assert hosts[0] == hosts[1] == hosts[2] == [f"backbone.layers.{i}.mixer.in_proj" for i in range(3)]
