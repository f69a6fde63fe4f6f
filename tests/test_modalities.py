"""Methods on families of models for images, speech, and images with text: each starts as the base model, trains every
part, and is saved and loaded whole. The models, their inputs and the check are those of the benchmark.
"""

import importlib
from pathlib import Path

import pytest
import torch
import transformers as T
from peft import get_peft_model

from hf_peft_ext import BitFitConfig, LayerPrefixConfig, TFewConfig, UniPELTConfig, find_target_modules
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import layer_paths, stacks

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
HEADS = {
    "vit": "image classification",
    "swin": "image classification",
    "cvt": "image classification",
    "hiera": "image classification",
    "imagegpt": "image classification",
    "segformer": "semantic segmentation",
    "detr": "object detection",
    "clip": "zero-shot image classification",
    "wav2vec2-conformer": "CTC",
    "audio-spectrogram-transformer": "audio classification",
    "whisper": "speech to text",
    "speech_to_text": "speech to text",
    "llava": "image-text to text",
    "qwen2_vl": "image-text to text",
    "blip": "image-text to text",
    "florence2": "image-text to text",
}
ALL_METHODS = ("vit", "cvt", "imagegpt", "wav2vec2-conformer", "whisper", "llava")  # the others with UniPELT alone
METHODS = {
    "UniPELT": lambda: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=3),
    "BitFit": BitFitConfig,
    "T-Few": TFewConfig,
}


@pytest.fixture
def benchmark_module(monkeypatch):
    """Import a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.filterwarnings("ignore")  # of transformers, about models made small
@pytest.mark.parametrize(
    ("model_type", "method"),
    [(m, method) for m in HEADS for method in METHODS if method == "UniPELT" or m in ALL_METHODS],
)
def test_method(model_type, method, benchmark_module):
    models, benchmark = benchmark_module("tiny_models"), benchmark_module("modalities")
    model, inputs = models.tiny(model_type, models.HEADS[HEADS[model_type]][model_type])
    benchmark.check(benchmark.Head(model, inputs), METHODS[method]())


def test_stages_of_convolutions_and_of_attention():
    """MobileViT has both; its blocks are those of the stages with attention."""
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 48], "image_size": 64}
    torch.manual_seed(0)
    model = T.MobileViTForImageClassification(T.MobileViTConfig(**sizes, initializer_range=0.3))
    lists = [path for path, _ in stacks(model)]
    assert lists == [f"mobilevit.encoder.layer.{i}.transformer.layer" for i in (2, 3, 4)]
    widths = {site.layer: site.d_in for site in find_sites(model) if site.name == "after_residual"}
    assert [widths[layer] for layer in sorted(widths)] == [16] * 2 + [24] * 4 + [32] * 3
    model = get_peft_model(model, UniPELTConfig(bottleneck_size=4)).eval()
    model(pixel_values=torch.randn(2, 3, 64, 64)).logits.square().sum().backward()
    assert len(tuner_layers(model)) == 9 * 4


@pytest.mark.filterwarnings("ignore")
def test_no_prefix_where_queries_are_pooled(benchmark_module):
    """Hiera pools queries where a stage begins: the output of attention has fewer tokens than its input."""
    models = benchmark_module("tiny_models")
    model, _ = models.tiny("hiera", T.HieraForImageClassification.__name__)
    pooling = {i for i, path in enumerate(layer_paths(model)) if model.get_submodule(path).attn.query_stride > 1}
    reached = {layer.site.layer for layer in tuner_layers(get_peft_model(model, LayerPrefixConfig()))}
    assert pooling
    assert reached == set(range(len(layer_paths(model)))) - pooling


def test_models_without_attention():
    """ConvNeXt has no attention: the error says so, and leaves the model alone."""
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    model = T.ConvNextForImageClassification(T.ConvNextConfig(**sizes))
    names = [name for name, _ in model.named_modules()]
    for config in (UniPELTConfig(), TFewConfig()):
        with pytest.raises(ValueError, match="Architecture 'convnext' has no attention blocks in which"):
            get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names


def llava():
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**vision, "num_key_value_heads": 2, "vocab_size": 99, "model_type": "llama"}
    vision |= {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    torch.manual_seed(0)
    return T.LlavaForConditionalGeneration(T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98))


def towers(config):
    """The layers of LLaVA that an adapter changes; 0 and 1 are the vision tower's."""
    return {layer.site.layer for layer in tuner_layers(get_peft_model(llava(), config))}


def test_which_tower():
    """All towers by default, as with the names that LoRA takes; one of them by either of two fields."""
    assert towers(UniPELTConfig()) == {0, 1, 2, 3}
    assert towers(UniPELTConfig(exclude_modules=r".*vision_tower.*")) == {2, 3}
    assert towers(UniPELTConfig(layers_to_transform=[0, 1])) == {0, 1}
    assert [path for path in layer_paths(llava()) if "vision_tower" in path] == layer_paths(llava())[:2]
    assert find_target_modules(llava()) == ["q_proj", "v_proj"]


def test_biases_of_the_tower_without():
    """CLIP has biases, Llama none: it gets new ones, as a Llama alone does."""
    model = llava()
    biases = {site.layer for site in find_sites(model) if site.name == "bias"}
    assert {0, 1, 2, 3} <= biases
    alone = T.LlamaForCausalLM(model.config.text_config)
    for layer in (0, 1):
        ours = {
            site.host.rpartition("layers.")[2]
            for site in find_sites(model)
            if site.name == "bias" and site.layer == layer + 2
        }
        assert ours == {
            s.host.rpartition("layers.")[2] for s in find_sites(alone) if s.name == "bias" and s.layer == layer
        }


@pytest.mark.filterwarnings("ignore")
def test_table(benchmark_module, monkeypatch, capsys, tmp_path):
    """The script counts what works, and says what does not, and why."""
    command = ["modalities", "--model_types", "convnext", "vit", "--methods", "T-Few", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setenv("COLUMNS", "200")
    benchmark_module("modalities").main()
    assert (
        "T-Few, convnext image classification: ValueError: Architecture 'convnext' has no" in capsys.readouterr().out
    )
    counts = (tmp_path / "modalities.csv").read_text(encoding="utf-8").splitlines()
    assert counts == ["heads,T-Few,built", "image classification,1,2", "all,1,2"]
