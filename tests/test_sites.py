"""Where sub-layers go: the sites found in each family, and how a user says it."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from hf_peft_ext import BitFitConfig, BottleneckConfig, ComposedConfig, MAMConfig, Placement, UniPELTConfig
from hf_peft_ext.sites import find_sites
from hf_peft_ext.structure import layer_paths
from hf_peft_ext.sublayers import Bias, LowRank
from hf_peft_ext.tuners.composed import attached

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
    (layer,) = attached(model)
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
    assert [layer.site.layer for layer in attached(model)] == [2, 3]


def test_pfeiffer_reads_after_residual_and_norm():
    """BERT: LayerNorm(h + residual + f(LayerNorm(h + residual))), computed by hand."""
    model = get_peft_model(BACKBONES["bert"].build(), BottleneckConfig(style="pfeiffer"))
    randomise(model)
    layer = model.base_model.model.encoder.layer[0]
    adapter = attached(layer)[0].sublayer_of["default"]
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
    adapter = next(a for a in attached(layer) if a.site.name == "parallel_ffn").sublayer_of["default"]
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
    assert {layer.site.layer for layer in attached(model)} == {1}
    assert not any(layer.site.host.endswith("v_proj") for layer in attached(model))


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
    assert [layer.site.host for layer in attached(tuned)] == ["body.0.mix", "body.1.mix", "body.1.drop"]
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
        for layer in attached(model):
            assert "lora_" not in layer.site.host
            layer.enable_adapters(False)
        torch.testing.assert_close(output(model.eval(), family.inputs()), lora)
