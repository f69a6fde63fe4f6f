"""Models whose blocks lie in stages, whose tokens lie in windows or packed, or whose modules run in another order than
that of their registration: every method works there, or its error comes before the model is touched.
"""

import logging
from dataclasses import replace

import pytest
import torch
import transformers as T
from peft import get_peft_model
from torch import nn

from hf_peft_ext import (
    BitFitConfig,
    BottleneckConfig,
    ComposedConfig,
    LayerPrefixConfig,
    MAMConfig,
    Placement,
    UniPELTConfig,
)
from hf_peft_ext.sites import find_sites
from hf_peft_ext.structure import layer_paths
from hf_peft_ext.tuners import plan
from hf_peft_ext.tuners.composed import attached

from .methods import randomise

STAGES = {"num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4]}
STAGES |= {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SMALL = {"vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPEECH = {**SMALL, "hidden_size": 32, "conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [2, 2],
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "conv_bias": True}  # fmt: skip
MODELS = {
    "swin": lambda: T.SwinForImageClassification(T.SwinConfig(**WINDOWS)),
    "swinv2": lambda: T.Swinv2ForImageClassification(T.Swinv2Config(**WINDOWS)),
    "donut": lambda: T.DonutSwinModel(T.DonutSwinConfig(**WINDOWS)),
    "segformer": lambda: T.SegformerForImageClassification(T.SegformerConfig(**STAGES)),
    "pvt_v2": lambda: T.PvtV2ForImageClassification(T.PvtV2Config(**STAGES, image_size=64)),
    "mobilebert": lambda: T.MobileBertForSequenceClassification(
        T.MobileBertConfig(**SMALL, hidden_size=32, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16)
    ),
    "wav2vec2": lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**SPEECH)),
    "wav2vec2_norms": lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**SPEECH, feat_extract_norm="layer")),
}
METHODS = {
    "unipelt": lambda: UniPELTConfig(bottleneck_size=8),
    "without_prefix": lambda: UniPELTConfig(methods=("adapter", "lora"), bottleneck_size=4),
    "houlsby": lambda: BottleneckConfig(style="houlsby", r=4),
    "pfeiffer": lambda: BottleneckConfig(r=4),
    "scaled_parallel": lambda: BottleneckConfig(style="scaled_parallel", r=4),
    "bitfit": BitFitConfig,
    "mam": lambda: MAMConfig(bottleneck_size=4, num_virtual_tokens=3),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def inputs(name):
    generator = torch.Generator().manual_seed(0)
    if name == "mobilebert":
        return {"input_ids": torch.randint(3, 90, (2, 7), generator=generator)}
    if name.startswith("wav2vec2"):
        return {"input_values": torch.randn(2, 200, generator=generator)}
    size = 64 if name in ("segformer", "pvt_v2") else 32
    return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


def result(model, batch):
    out = model(**batch)
    return out.logits if "logits" in out else out[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_works_or_leaves_the_model_alone(name, method):
    """Every parameter that was attached has a gradient; a method without a site leaves nothing behind."""
    base = build(name)
    before = {path: len(m._forward_hooks) + len(m._forward_pre_hooks) for path, m in base.named_modules()}
    if method in ("unipelt", "mam") and not any(site.name == "attention" for site in find_sites(base)):
        with pytest.raises(ValueError, match="has no place for `prefix` at `attention`; leave it out"):
            get_peft_model(base, METHODS[method]())
        assert {path: len(m._forward_hooks) + len(m._forward_pre_hooks) for path, m in base.named_modules()} == before
        return
    model = get_peft_model(base, METHODS[method]())
    randomise(model.eval(), std=0.1)
    result(model, inputs(name)).square().sum().backward()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in own.items() if p.grad is None or not p.grad.any()]
    assert {layer.site.layer for layer in attached(model)} >= set(range(len(layer_paths(build(name)))))


@pytest.mark.parametrize("name", ["swin", "donut", "segformer", "pvt_v2"])
def test_blocks_of_stages(name):
    """The blocks of all stages in order, each in the width of its stage."""
    model = build(name)
    widths = {site.layer: site.d_in for site in find_sites(model) if site.name == "after_residual"}
    assert widths == {0: 16, 1: 16, 2: 32, 3: 32}
    assert [path.rpartition(".")[2] for path in layer_paths(model)] == ["0", "1"] * 2


def test_ffn_of_mobilebert():
    """Its last FFN runs behind those of the list, which is registered behind it."""
    sites = {site.name: site for site in find_sites(build("mobilebert")) if site.layer == 0}
    first = "mobilebert.encoder.layer.0"
    assert (sites["parallel_ffn"].reads, sites["parallel_ffn"].host) == (
        f"{first}.intermediate.dense",
        f"{first}.output.dense",
    )
    assert sites["after_residual"].host == f"{first}.output.LayerNorm"


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2_norms"])
def test_biases_along_the_last_axis(name):
    """A bias goes where features lie along the last axis: not to a convolution, nor to a norm of groups."""
    model = get_peft_model(build(name), BitFitConfig()).eval()
    seen = {}
    for layer in attached(model):
        assert not isinstance(layer.host, (nn.GroupNorm, nn.Conv1d))
        layer.host.register_forward_hook(lambda host, _, y, at=layer: seen.update({at.site.host: y.shape[-1]}))
    result(model, inputs(name))
    assert seen == {layer.site.host: layer.site.d_out for layer in attached(model)}
    convolutions = {path.rpartition(".")[2] for path in seen if "feature_extractor" in path}
    assert convolutions == (set() if name == "wav2vec2" else {"layer_norm"})


def packed(kind):
    """A model that reads images as one sequence of patches, without an axis for the examples."""
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text |= {"intermediate_size": 64, "vocab_size": 200, "pad_token_id": 0, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "patch_size": 4, "num_heads": 4, "spatial_merge_size": 2}
    vision |= {"embed_dim": 32, "mlp_ratio": 2} if kind == "Qwen2VL" else {"out_hidden_size": 32}
    vision |= {} if kind == "Qwen2VL" else {"intermediate_size": 64}
    tokens = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
    extra = {"Qwen3VL": {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}, "Glm4v": {"image_size": 32},
             "Qwen2_5_VL": {"window_size": 16, "fullatt_block_indexes": [1]}}  # fmt: skip
    if kind == "Qwen3VL":
        text["head_dim"] = 8
    if kind == "Glm4v":
        rope["partial_rotary_factor"] = 1.0
        tokens = {"image_token_id": 150, "video_token_id": 151, "image_start_token_id": 152, "image_end_token_id": 153}
    config = getattr(T, f"{kind}Config")(
        text_config=text, vision_config={**vision, "temporal_patch_size": 2, **extra.get(kind, {})}, **tokens
    )
    torch.manual_seed(0)
    return getattr(T, f"{kind}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Glm4v"])
def test_gates_of_packed_patches(kind, caplog):
    """Patches of all images lie in one row: each token has its own gate there; a gated prefix has no place."""
    with caplog.at_level(logging.WARNING, "hf_peft_ext"):
        model = get_peft_model(packed(kind), UniPELTConfig(bottleneck_size=4))
    assert caplog.messages == ["`prefix` at `attention` has no place in layers 0 to 1 of 4; the others have it."]
    gates = {s.gate.pooling for layer in attached(model) for s in layer.sublayer_of.values() if s.gate}
    assert gates == {"token"}
    ids = torch.tensor([[152] + [150] * 4 + [5] * 9, [152] + [150] * 8 + [5] * 5])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(48, 3 * 2 * 16)}
    batch |= {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]]), "mm_token_type_ids": (ids == 150).long()}
    randomise(model, std=0.1)
    model.train()(**batch).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="whose rows are not whole examples; use 'token'"):
        get_peft_model(packed(kind), UniPELTConfig(methods=("adapter",), gate_pooling="mean"))


class Backwards(nn.Module):
    """Runs `late` before `early`."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.early(self.late(x))


def test_a_span_that_ends_before_it_starts():
    model = nn.ModuleDict({"body": Backwards()})
    placement = Placement("bottleneck", "parallel_ffn", options={"r": 2})
    config = ComposedConfig(placements=[placement], sites={"parallel_ffn": ["body.late"]})
    ((_, site),) = plan.plan(model, config)["body.late"]
    with pytest.raises(ValueError, match=r"of body.late, which runs before body.early, whose input it should read"):
        plan.check_fit(model, placement, replace(site, act="span", reads="body.early"))
    with pytest.raises(ValueError, match=r"whose widths are others \(9 for 8\)"):
        plan.check_fit(model, placement, replace(site, d_out=9, d_in=9, act="output"))


@pytest.mark.parametrize("model_type", ["xglm", "led"])
def test_prefixes_of_decoders_with_a_cache(model_type):
    """XGLM and LED's decoder take a prefix through their cache, whatever its argument is called."""
    if model_type == "xglm":
        sizes = {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "vocab_size": 60}
        model = T.AutoModelForCausalLM.from_config(T.AutoConfig.for_model("xglm", **sizes, pad_token_id=0))
    else:
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
                 "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 60,
                 "attention_window": [4], "pad_token_id": 0, "decoder_start_token_id": 2}  # fmt: skip
        model = T.AutoModelForSeq2SeqLM.from_config(T.AutoConfig.for_model("led", **sizes))
    model = get_peft_model(model, LayerPrefixConfig(num_virtual_tokens=3)).eval()
    randomise(model)
    assert {layer.site.layer for layer in attached(model)} == ({0, 1} if model_type == "xglm" else {1, 2})
    ids = torch.arange(4, 12)[None]
    wanted = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached, plain = (torch.stack(model.generate(ids, use_cache=c, **wanted).logits) for c in (True, False))
        with model.disable_adapter():
            base = torch.stack(model.generate(ids, use_cache=True, **wanted).logits)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)
    assert (cached - base).abs().max() > 1e-3
