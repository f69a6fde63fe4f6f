"""Prefixes with a softmax of their own: the formula on many families, other sub-layers beside them, any kernel."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_peft_ext import ComposedConfig, LayerPrefixConfig, Placement, UniPELTConfig
from hf_peft_ext.attach.forward_state import FORWARD
from hf_peft_ext.attach.separate_prefix import SeparatePrefix

from .backbones import BACKBONES, output
from .methods import randomise

P = 3
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Encoders whose attention takes no prefix under a joint softmax.
OTHERS = {
    "deberta-v2": {"intermediate_size": 64, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "mpnet": {"intermediate_size": 64},
    "flaubert": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 60},
    "deberta": {"intermediate_size": 64, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    "funnel": {"d_model": 32, "d_head": 8, "n_head": 4, "d_inner": 64, "block_sizes": [1, 1]},
}


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, SeparatePrefix)]


def by_formula(model, inputs):
    """The output of a model whose prefixes are computed here: each query head of each layer by itself."""
    handles = []
    with torch.no_grad():
        for layer in layers_of(model):
            prefix, site = layer.sublayer_of["default"], layer.site
            kept = {}

            def keep_queries(leaf, args, q, site=site, kept=kept):
                kept["q"] = q if site.query_rows is None else q[..., site.query_rows]

            def add(leaf, args, prefix=prefix, kept=kept):
                p_k, p_v = prefix.P_K, prefix.P_V
                d_k, q = p_k.shape[-1], kept.pop("q")
                heads = q.shape[-1] // d_k
                parts = []
                for head in range(heads):
                    shared = head // (heads // len(p_k))
                    share = torch.softmax(q[..., d_k * head : d_k * (head + 1)] @ p_k[shared].T / d_k**0.5, dim=-1)
                    parts.append(share @ p_v[shared])
                return args[0] + torch.cat(parts, dim=-1), *args[1:]

            base = model.get_base_model()
            handles.append(base.get_submodule(site.host).register_forward_hook(keep_queries))
            handles.append(base.get_submodule(site.output).register_forward_pre_hook(add))
        with model.disable_adapter():
            result = output(model, inputs)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("backbone", BACKBONES)
def test_formula(backbone):
    """softmax(Q K^T) V + softmax(Q P_K^T / sqrt(d_k)) P_V, in every attention module of every family."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), LayerPrefixConfig(num_virtual_tokens=P)).eval()
    randomise(model, std=0.7)
    with torch.no_grad():
        torch.testing.assert_close(output(model, family.inputs()), by_formula(model, family.inputs()))
    cross = {layer.site.name for layer in layers_of(model)}
    assert cross == ({"attention", "cross_attention"} if family.kind == "seq2seq" else {"attention"})


@pytest.mark.parametrize("model_type", OTHERS)
def test_encoders_without_attention_interface(model_type):
    """They take it; under a joint softmax they take none, and the error says so."""
    sizes = {**SIZES, **OTHERS[model_type]}
    if "block_sizes" in sizes:
        del sizes["num_hidden_layers"]
    config = AutoConfig.for_model(model_type, **sizes)
    base = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model = get_peft_model(base, LayerPrefixConfig(num_virtual_tokens=P)).eval()
    inputs = {"input_ids": torch.randint(3, 60, (2, 7))}
    with torch.no_grad(), model.disable_adapter():
        base = output(model, inputs)
    with torch.no_grad():
        assert torch.equal(output(model, inputs), base)
    randomise(model)
    with torch.no_grad():
        ours = output(model, inputs)
        torch.testing.assert_close(ours, by_formula(model, inputs))
    assert (ours - base).abs().max() > 1e-3
    assert len(layers_of(model)) == 2
    message = f"Architecture '{model_type}' has no place for `prefix` at `attention`"
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(AutoModelForSequenceClassification.from_config(config), LayerPrefixConfig(init="paper"))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_any_kernel(implementation):
    """Attention itself is left alone, so that no kernel is refused."""
    model = BACKBONES["llama"].build()
    model.config._attn_implementation_internal = implementation
    assert layers_of(get_peft_model(model, LayerPrefixConfig()))


@pytest.mark.parametrize("backbone", ["bert", "gpt2"])
def test_queries_include_what_other_sublayers_add(backbone, tmp_path):
    """The prefix reads the queries after low-rank branches and biases, in whatever order they were attached."""
    family = BACKBONES[backbone]
    placements = [
        Placement("prefix", "attention", options={"num_virtual_tokens": P}),
        Placement("low_rank", "query", options={"r": 2}),
        Placement("bias", "bias"),
    ]
    results = []
    for order in (placements, placements[::-1]):
        model = get_peft_model(family.build(), ComposedConfig(placements=order)).eval()
        randomised = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
                parameter.copy_(torch.randn(parameter.shape, generator=randomised) * 0.3)
            results.append(output(model, family.inputs()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output(again, family.inputs()), results[1])


@pytest.mark.filterwarnings("ignore:You are trying to modify:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_inside_a_lora_of_peft():
    """A prefix on a model with peft's LoRA on its queries, and the LoRA active: both act."""
    family = BACKBONES["bert"]
    lora = LoraConfig(target_modules=["query"], init_lora_weights=False)
    base = get_peft_model(family.build(), lora).eval()
    with torch.no_grad():
        expected = output(base, family.inputs())
        model = get_peft_model(base, LayerPrefixConfig(num_virtual_tokens=P)).eval()
        torch.testing.assert_close(output(model, family.inputs()), expected)
        randomise(model)
        assert (output(model, family.inputs()) - expected).abs().max() > 1e-3


def test_two_active_adapters_add_up():
    family = BACKBONES["llama"]
    model = get_peft_model(family.build(), LayerPrefixConfig(num_virtual_tokens=P, layers_to_transform=[1])).eval()
    model.add_adapter("other", LayerPrefixConfig(num_virtual_tokens=5, layers_to_transform=[1]))
    randomise(model)
    randomise(model, "other", seed=1)
    output_leaf = model.get_base_model().model.layers[1].self_attn.o_proj
    read = []
    output_leaf.register_forward_hook(lambda leaf, args, result: read.append(args[0]))
    with torch.no_grad():
        for active in ([], ["default"], ["other"], ["default", "other"]):
            model.base_model.set_adapter(active or ["default"])
            with model.disable_adapter() if not active else torch.no_grad():
                output(model, family.inputs())
    base, one, other, both = read
    torch.testing.assert_close(both - base, (one - base) + (other - base), rtol=1e-4, atol=1e-5)


def test_a_failed_forward_leaves_nothing():
    """What was handed on by a forward that failed is not added in the next one, whose adapter is disabled."""
    family = BACKBONES["bert"]
    model = get_peft_model(family.build(), UniPELTConfig(bottleneck_size=4)).eval()
    randomise(model)
    key_leaf = model.get_base_model().encoder.layer[0].attention.self.key

    def fail(*args):
        raise RuntimeError("stop")

    with torch.no_grad(), model.disable_adapter():
        base = output(model, family.inputs())
    handle = key_leaf.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad():
        output(model, family.inputs())
    handle.remove()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(output(model, family.inputs()), base)


def test_another_layout_of_tokens_is_refused():
    """An attention module that regroups its tokens between the two leaves gets an error, not wrong sums."""
    family = BACKBONES["bert"]
    model = get_peft_model(family.build(), LayerPrefixConfig(num_virtual_tokens=P)).eval()
    output_leaf = model.get_base_model().get_submodule(layers_of(model)[0].site.output)
    output_leaf.register_forward_pre_hook(lambda leaf, args: (args[0].flatten(0, 1),), prepend=True)
    with pytest.raises(ValueError, match=re.escape("reads (27, 32); leave the prefix out")):
        output(model, family.inputs())
    FORWARD.values.clear()


def test_starts_with_gradients():
    """Zero values: the first step moves P_V, the second P_K, the same for each head."""
    family = BACKBONES["llama"]
    model = get_peft_model(family.build(), LayerPrefixConfig(num_virtual_tokens=P))
    output(model, family.inputs()).square().mean().backward()
    for layer in layers_of(model):
        prefix = layer.sublayer_of["default"]
        assert prefix.P_V.grad.abs().amax(dim=(1, 2)).min() > 0
        assert not prefix.P_K.grad.any()
