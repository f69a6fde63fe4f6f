"""Ladders on families beyond those of the contract: found by the structure of their blocks, with no list of names.

Each family is a tiny config. Checked against the base model, against loops without a cache, and against a fresh model
that loads the saved adapter.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel

from hf_peft_ext import LadderConfig

from .backbones import BACKBONES, ENCODER_DECODER, GROUPED, HEADS, HYBRIDS, LAYERS, PLAIN, Backbone, D, output
from .methods import randomise
from .saved_adapters import fingerprint
from .test_ladder import gradients

BART = {**ENCODER_DECODER, "d_model": D, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "decoder_ffn_dim": 64,
        "decoder_start_token_id": 2, "max_position_embeddings": 64}  # fmt: skip
GPT = {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
DEEP = {**GROUPED, "head_dim": 8}
FAMILIES = {
    name: Backbone(kind, model_type, config)
    for name, kind, model_type, config in (
        # fused and interleaved projections, one or several queries to a key
        ("falcon with one key", "decoder", "falcon", {"hidden_size": D, "num_hidden_layers": LAYERS,
                                                      "num_attention_heads": HEADS, "multi_query": True}),
        ("falcon with slopes", "decoder", "falcon", {"hidden_size": D, "num_hidden_layers": LAYERS, "alibi": True,
                                                     "num_attention_heads": HEADS, "multi_query": False}),
        ("gpt_bigcode", "decoder", "gpt_bigcode", GPT),
        ("phi3", "decoder", "phi3", {**DEEP, "max_position_embeddings": 64, "original_max_position_embeddings": 64}),
        # rotary positions on a part of a head, norms over a head or over all, blocks in parallel
        ("gpt_neo", "decoder", "gpt_neo", {"hidden_size": D, "num_layers": LAYERS, "num_heads": HEADS,
                                           "attention_types": [[["global", "local"], 1]],
                                           "max_position_embeddings": 64}),
        ("phi", "decoder", "phi", PLAIN),
        ("stablelm", "decoder", "stablelm", {**PLAIN, "num_key_value_heads": 2}),
        ("cohere", "decoder", "cohere", {**PLAIN, "num_key_value_heads": 2}),
        ("olmo2", "decoder", "olmo2", {**PLAIN, "num_key_value_heads": HEADS}),
        ("qwen3", "decoder", "qwen3", DEEP),
        ("gemma", "decoder", "gemma", DEEP),
        ("starcoder2", "decoder", "starcoder2", {**PLAIN, "num_key_value_heads": 2}),
        # encoders, with embeddings of another width
        ("electra with a projection", "encoder", "electra", {**PLAIN, "embedding_size": 16}),
        ("xlm_roberta", "encoder", "xlm-roberta", PLAIN),
        # encoder-decoders
        ("mbart", "seq2seq", "mbart", BART),
        ("blenderbot", "seq2seq", "blenderbot", BART),
    )
}  # fmt: skip
every_family = pytest.mark.parametrize("name", FAMILIES)


def laddered(name, config=None):
    model = get_peft_model(FAMILIES[name].build(), config or LadderConfig(r=4))
    randomise(model)
    return model.eval(), FAMILIES[name].inputs()


def sides(model):
    return [module.side_of["default"] for module in model.modules() if hasattr(module, "side_of")]


@every_family
def test_a_side_network_of_full_width_is_the_backbone(name):
    """At r = 1, with closed gates and identities as projections: every weight is where it belongs."""
    model = get_peft_model(FAMILIES[name].build(), LadderConfig(r=1, init="paper")).eval()
    inputs = FAMILIES[name].inputs()
    with torch.no_grad():
        for side in sides(model):
            for block in side.side_blocks:
                block.alpha.fill_(10.0)
            for linear in [side.stack.get_input_embeddings().down, *([side.up] if side.up else [])]:
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
        base = output(FAMILIES[name].build(), inputs)
        torch.testing.assert_close(output(model, inputs), base, rtol=1e-4, atol=1e-4)


@every_family
def test_one_step_changes_only_its_own_parameters(name):
    """Disabled, the trained ladder leaves the base model's outputs, bit for bit."""
    base, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    with torch.no_grad():
        expected = output(base, inputs)
    model = get_peft_model(base, LadderConfig(r=4))
    randomise(model)
    before = {parameter: p.clone() for parameter, p in model.named_parameters()}
    found = gradients(model.train(), inputs)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    changed = {parameter for parameter, p in model.named_parameters() if not torch.equal(p, before[parameter])}
    assert changed <= found.keys() == {parameter for parameter in before if ".side_of.default." in parameter}
    assert all(any(f".{part}." in f"{parameter}." for parameter in changed) for part in ("block", "down", "alpha"))
    with torch.no_grad(), model.eval().disable_adapter():
        assert torch.equal(output(model, inputs), expected)


@every_family
def test_saved_and_loaded(name, tmp_path):
    model, inputs = laddered(name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(FAMILIES[name].build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output(again, inputs), output(model, inputs))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.kind != "encoder"])
def test_cached_generation_equals_uncached(name):
    """Greedy, with a side block at the last layer alone too."""
    last = [1, 3] if FAMILIES[name].kind == "seq2seq" else FAMILIES[name].build().config.num_hidden_layers - 1
    for config in (LadderConfig(r=4), LadderConfig(r=4, layers_to_keep=last)):
        model, _ = laddered(name, config)
        inputs = FAMILIES[name].inputs(padding="left")
        inputs.pop("decoder_input_ids", None)
        options = {
            **inputs,
            "max_new_tokens": 5,
            "do_sample": False,
            "eos_token_id": None,
            "forced_eos_token_id": None,
        }
        tokens = [model.generate(**options, use_cache=use_cache) for use_cache in (True, False)]
        assert torch.equal(*tokens)


REFUSED = {
    "albert": "it shares 1 blocks among its 4 layers",
    "deepseek_v3": "the heads of .* have an unknown width",
    "qwen3_next": ".*linear_attn.out_proj belongs to no softmax attention",
    "jamba": ".*mamba.out_proj belongs to no softmax attention",
    "mamba": "no supported transformer blocks were found",
}


@pytest.mark.parametrize("name", [name for name in REFUSED if name in BACKBONES | HYBRIDS])
def test_refused_families(name):
    """The error names the reason, and the model is not changed."""
    shared = {"num_hidden_groups": 1} if name == "albert" else {}
    base = (BACKBONES | HYBRIDS)[name].build(**shared)
    before = fingerprint(base)
    with pytest.raises(ValueError, match=f"cannot be cut: {REFUSED[name]}"):
        get_peft_model(base, LadderConfig())
    assert fingerprint(base) == before


def test_a_model_of_images_is_refused():
    vit = AutoModel.from_config(AutoConfig.for_model("vit", **PLAIN, image_size=8, patch_size=4))
    with pytest.raises(ValueError, match=r"cannot be cut: ViTModel embeds no tokens"):
        get_peft_model(vit, LadderConfig())
