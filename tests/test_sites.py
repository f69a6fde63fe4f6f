"""Where sub-layers go: the sites found in each family, and how a user says it."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.pytorch_utils import Conv1D

from hf_peft_ext import BitFitConfig, BottleneckConfig, ComposedConfig, MAMConfig, Placement, UniPELTConfig
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.model.calls import code_of
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import is_bypassed, layer_paths
from hf_peft_ext.sublayers import Bias, LowRank

from .backbones import BACKBONES, output
from .methods import randomise

# family -> the modules, in the first layer, of: query, attention output, after_ffn, after_residual
EXPECTED = {
    "bert": ("attention.self.query", "attention.output.dense", "output.dense", "output.LayerNorm"),
    "roberta": ("attention.self.query", "attention.output.dense", "output.dense", "output.LayerNorm"),
    "electra": ("attention.self.query", "attention.output.dense", "output.dense", "output.LayerNorm"),
    "distilbert": ("attention.q_lin", "attention.out_lin", "ffn", "output_layer_norm"),
    "modernbert": ("attn.Wqkv", "attn.Wo", "mlp", ""),
    "t5": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o", "layer.1.DenseReluDense", ""),
    "bart": ("self_attn.q_proj", "self_attn.out_proj", "fc2", "final_layer_norm"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp", ""),
    "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp", ""),
    "opt": ("self_attn.q_proj", "self_attn.out_proj", "fc2", ""),
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp", ""),
    "qwen2": ("self_attn.q_proj", "self_attn.o_proj", "mlp", ""),
    "gemma2": ("self_attn.q_proj", "self_attn.o_proj", "mlp", ""),
    "mistral": ("self_attn.q_proj", "self_attn.o_proj", "mlp", ""),
    "albert": ("attention.query", "attention.dense", "ffn_output", "full_layer_layer_norm"),
    "falcon": ("self_attention.query_key_value", "self_attention.dense", "mlp", ""),
    "bloom": ("self_attention.query_key_value", "self_attention.dense", "mlp", ""),
    "deepseek_v3": ("self_attn.q_b_proj", "self_attn.o_proj", "mlp", ""),
}
# model type -> what makes a tiny model with a projection of several roles, and a variant of it
FUSED = {
    "gpt2": ({}, {}),
    "phi3": ({"num_key_value_heads": 2}, {"num_key_value_heads": 4}),
    "gpt_neox": ({}, {}),
    "bloom": ({}, {}),
    "falcon": ({"multi_query": False}, {"multi_query": True}),
    "falcon_grouped": ({"new_decoder_architecture": True, "num_kv_heads": 2}, {"alibi": True, "multi_query": False}),
    "mpt": ({}, {}),
    "codegen": ({"rotary_dim": 4}, {"rotary_dim": 8}),
    "gpt_bigcode": ({"multi_query": True}, {"multi_query": False}),
    "persimmon": ({}, {}),
    "deepseek_v3": (BACKBONES["deepseek_v3"].config, {**BACKBONES["deepseek_v3"].config, "q_lora_rank": None}),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_sites_of_each_family(backbone):
    model = BACKBONES[backbone].build()
    first = layer_paths(model)[0]
    hosts = {site.name: site.host for site in find_sites(model) if site.layer == 0}
    found = [hosts[name] for name in ("query", "attention_output", "after_ffn", "after_residual")]
    assert found == [f"{first}.{path}" if path else first for path in EXPECTED[backbone]]
    assert {"query", "key", "value", "attention", "parallel_ffn", "parallel_attention"} <= hosts.keys()


def test_norm_of_a_head_is_none_of_the_stack():
    """DistilBERT's language model head has a norm of its own; the blocks are post-norm all the same."""
    config = AutoConfig.for_model("distilbert", vocab_size=60, **BACKBONES["distilbert"].config)
    sites = {site.name: site for site in find_sites(AutoModelForMaskedLM.from_config(config)) if site.layer == 0}
    assert sites["after_residual"].host.endswith("layer.0.output_layer_norm")
    assert "parallel_residual" not in sites


@pytest.mark.parametrize("backbone", ["t5", "gpt2", "llama", "opt", "gpt_neox"])
def test_parallel_residual(backbone):
    """It reads what the norm in front of the FFN reads, and adds to what the FFN gives."""
    family = BACKBONES[backbone]
    config = ComposedConfig(placements=[Placement("bottleneck", "parallel_residual", layers=[0], options={"r": 4})])
    model = get_peft_model(family.build(), config).eval()
    randomise(model)
    (layer,) = tuner_layers(model)
    norm, seen = model.get_base_model().get_submodule(layer.site.reads), {}
    norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    layer.host.register_forward_hook(lambda _, args, y: seen.update(y=y))
    with torch.no_grad():
        output(model, family.inputs())
        with_branch = seen["y"]
        branch = layer.sublayer_of["default"](seen["x"])
        with model.disable_adapter():
            output(model, family.inputs())
    torch.testing.assert_close(with_branch, seen["y"] + branch)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_causal_layers(backbone):
    """Encoders see both ways, decoders back only; an encoder-decoder has both, encoder first."""
    causal = {site.layer: site.causal for site in find_sites(BACKBONES[backbone].build()) if site.name == "query"}
    expected = {"encoder": [False] * 2, "decoder": [True] * 2, "seq2seq": [False, False, True, True]}
    assert list(causal.values()) == expected[BACKBONES[backbone].kind]


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("name", FUSED)
def test_rows_of_fused_projections(name, variant):
    """What is written to the rows of the query, key or value reaches that alone: seen in the first layer's cache."""
    own = {"n_layer": 2, "n_head": 4, "n_embd": 32, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_inner": 64}
    plain = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model_type = name.removesuffix("_grouped")
    config = AutoConfig.for_model(model_type)
    sizes = {k: v for k, v in {**own, **plain}.items() if k in vars(config) or k in config.attribute_map}
    sizes |= {"vocab_size": 60, "pad_token_id": 0, **FUSED[name][variant]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    sites = {site.name: site for site in find_sites(model) if site.layer == 0}
    ids = torch.arange(3, 12)[None]

    def cached():
        with torch.no_grad():
            result = model(ids, use_cache=True, output_hidden_states=True)
        layer = result.past_key_values.layers[0]
        return layer.keys.clone(), layer.values.clone(), result.logits

    before = cached()
    for role in ("query", "key", "value"):
        site = sites[role]
        weight = model.get_submodule(site.host).weight
        kept = weight.detach().clone()
        rows = slice(None) if site.rows is None else site.rows
        with torch.no_grad():
            (weight.T if isinstance(model.get_submodule(site.host), Conv1D) else weight)[rows] += 0.5
        key, value, logits = (not torch.equal(a, b) for a, b in zip(cached(), before, strict=True))
        latent = name == "deepseek_v3"  # its cache holds what the projection reads
        assert (key, value, logits) == (role == "key" and not latent, role == "value" and not latent, True), role
        with torch.no_grad():
            weight.copy_(kept)


def test_rows_of_a_latent_projection():
    """DeepSeek: the rows of the key and of the value, seen in what the kernel is given."""
    seen = []

    def capture(module, query, key, value, mask, **kwargs):
        seen.append((query.clone(), key.clone(), value.clone()))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("capture", capture)
    model = BACKBONES["deepseek_v3"].build("capture")
    sites = {site.name: site for site in find_sites(model) if site.layer == 0}
    for i, role in enumerate(("query", "key", "value")):
        weight, rows = model.get_submodule(sites[role].host).weight, sites[role].rows
        seen.clear()
        with torch.no_grad():
            model(torch.arange(3, 12)[None])
            weight[slice(None) if rows is None else rows] += 0.5
            model(torch.arange(3, 12)[None])
        before, after = seen[0], seen[len(seen) // 2]
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i == 0, i == 1, i == 2]


def test_post_norm_decoder():
    """OPT-350m normalises after each residual, unlike the other OPTs."""
    model = BACKBONES["opt"].build(do_layer_norm_before=False)
    sites = {site.name: site for site in find_sites(model) if site.layer == 0}
    assert sites["after_residual"].host.endswith("layers.0.final_layer_norm")


def test_cross_attention_of_an_encoder_decoder():
    sites = [site for site in find_sites(BACKBONES["t5"].build()) if site.layer == 3]
    cross = {site.name: site.host for site in sites if site.name.startswith("cross_")}
    assert cross["cross_query"].endswith("layer.1.EncDecAttention.q")
    model = get_peft_model(BACKBONES["t5"].build(), ComposedConfig(placements=[Placement("low_rank", "cross_query")]))
    assert [layer.site.layer for layer in tuner_layers(model)] == [2, 3]


def test_pfeiffer_reads_after_residual_and_norm():
    """BERT: LayerNorm(h + residual + f(LayerNorm(h + residual))), computed by hand."""
    model = get_peft_model(BACKBONES["bert"].build(), BottleneckConfig(style="pfeiffer"))
    randomise(model)
    layer = model.base_model.model.encoder.layer[0]
    adapter = tuner_layers(layer)[0].sublayer_of["default"]
    inner, residual = torch.randn(2, 5, 64), torch.randn(2, 5, 32)
    norm = torch.nn.functional.layer_norm
    s = layer.output.dense(inner) + residual
    weights = ((32,), layer.output.LayerNorm.weight, layer.output.LayerNorm.bias, layer.output.LayerNorm.eps)
    expected = norm(s + adapter(norm(s, *weights)), *weights)
    torch.testing.assert_close(layer.output(inner, residual), expected)


def test_parallel_adapter_of_bert_reads_the_input_of_the_ffn():
    """LayerNorm(FFN(x) + s f(x) + x), computed by hand."""
    model = get_peft_model(BACKBONES["bert"].build(), MAMConfig(bottleneck_size=4))
    randomise(model)
    layer = model.base_model.model.encoder.layer[0]
    adapter = next(a for a in tuner_layers(layer) if a.site.name == "parallel_ffn").sublayer_of["default"]
    x = torch.randn(2, 5, 32)
    ffn = torch.nn.functional.linear(layer.intermediate(x), layer.output.dense.weight, layer.output.dense.bias)
    layer.intermediate(x)
    torch.testing.assert_close(layer.output(layer.intermediate(x), x), layer.output.LayerNorm(ffn + adapter(x) + x))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bitfit_trains_every_bias_below_the_head(backbone):
    """Existing ones where there are any, else one on each linear leaf of the blocks."""
    base = BACKBONES[backbone].build()
    body = getattr(base, base.base_model_prefix, base)
    existing = {n for n, p in body.named_parameters() if n.endswith(".bias") and p.ndim == 1 and "emb_b" not in n}
    model = get_peft_model(base, BitFitConfig())
    widths = sorted(m.b.numel() for m in model.modules() if isinstance(m, Bias))
    if existing:
        assert widths == sorted(p.numel() for n, p in body.named_parameters() if n in existing)
    else:
        assert len(widths) == sum(isinstance(m, nn.Linear) for path in layer_paths(base)
                                  for m in base.get_submodule(path).modules())  # fmt: skip


def test_target_modules_as_in_peft():
    """Endings, a regular expression or all-linear put the low-rank branch on just these leaves."""
    for targets, expected in ((["q_proj", "o_proj"], 4), (r".*layers\.1\.mlp\..*_proj", 3), ("all-linear", 14)):
        config = UniPELTConfig(methods=("lora", "prefix"), target_modules=targets)
        model = get_peft_model(BACKBONES["llama"].build(), config)
        assert sum(isinstance(m, LowRank) for m in model.modules()) == expected


def test_layers_and_exclusions():
    config = UniPELTConfig(bottleneck_size=4, layers_to_transform=1, exclude_modules=["v_proj"])
    model = get_peft_model(BACKBONES["llama"].build(), config)
    assert {layer.site.layer for layer in tuner_layers(model)} == {1}
    assert not any(layer.site.host.endswith("v_proj") for layer in tuner_layers(model))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.lift, self.drop = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.mix(x)
        return x + self.drop(torch.relu(self.lift(x)))


class Homemade(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.body:
            x = block(x)
        return x


def test_a_model_of_ones_own():
    """`sites` says where things are in a model whose structure tells nothing."""
    config = ComposedConfig(
        placements=[
            Placement("low_rank", "query", options={"r": 2}),
            Placement("bottleneck", "after_ffn", layers=[1], options={"r": 2}),
        ],
        sites={"query": ["mix"], "after_ffn": r"body\.\d+\.drop"},
    )
    x = torch.randn(3, 4, 8)
    model = Homemade()
    base = model(x)
    tuned = get_peft_model(model, config)
    randomise(tuned)
    assert [layer.site.host for layer in tuner_layers(tuned)] == ["body.0.mix", "body.1.mix", "body.1.drop"]
    assert (tuned(x) - base).abs().max() > 1e-2
    with tuned.disable_adapter():
        assert torch.equal(tuned(x), base)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_on_top_of_a_lora_model():
    """Leaves that peft's LoRA has wrapped are found and work as before."""
    from peft import LoraConfig, inject_adapter_in_model

    family = BACKBONES["llama"]
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), family.build())
    with torch.no_grad():
        lora = output(model.eval(), family.inputs())
        inject_adapter_in_model(UniPELTConfig(methods=("lora", "adapter"), bottleneck_size=4), model)
        for layer in tuner_layers(model):
            assert "lora_" not in layer.site.host
            layer.enable_adapters(False)
        torch.testing.assert_close(output(model.eval(), family.inputs()), lora)


def test_classes_without_source():
    """Attention written in a notebook, inherited from transformers: no source to look at, another module's name."""
    scope = {"BloomAttention": BloomAttention, "__name__": "notebook"}
    exec("class Mine(BloomAttention):\n    pass", scope)
    model = BACKBONES["bloom"].build()
    expected = {(site.name, site.host): site for site in find_sites(model)}
    for block in model.transformer.h:
        block.self_attention.__class__ = scope["Mine"]
    found = {(site.name, site.host): site for site in find_sites(model)}
    assert found.keys() == expected.keys()
    for name in (key for key, site in found.items() if site.rows is not None):
        assert torch.equal(found[name].rows, expected[name].rows)


class Picks(nn.Module):
    """Runs all modules of two lists, and of two others the one that the caller names."""

    def __init__(self):
        super().__init__()
        for name in ("each", "numbered", "chosen", "looked_up", "helped"):
            self.add_module(name, nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
        self.places = {7: 0}

    def forward(self, x, layer):
        for module in self.each:
            x = module(x)
        for number in range(2):
            group = number // 1
            x = self.helper(self.numbered[group](x), number)
        place = self.places[layer]
        return self.chosen[layer - 7](self.looked_up[place](x))

    def helper(self, x, number):
        return self.helped[number](x)


def test_modules_that_the_caller_picks():
    """Of a list with an index from outside the code does not tell which module runs; a loop runs them all."""
    assert code_of(Picks).picked == {"chosen", "looked_up"}
    model = nn.Sequential(Picks())
    picked = [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear) and is_bypassed(model, path)
    ]
    assert picked == [f"0.{name}.{i}" for name in ("chosen", "looked_up") for i in (0, 1)]
