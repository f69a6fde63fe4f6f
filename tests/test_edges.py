"""Rare paths, each of which went wrong once: what a fresh reader of the code found."""

import copy
import inspect

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModel, StaticCache

from hf_peft_ext import (
    BitFitConfig,
    ComposedConfig,
    LayerPrefixConfig,
    MAMConfig,
    Placement,
    UniPELTConfig,
    fix_gates,
    gate_values,
    merge_prefix_projections,
)
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.model.structure import CACHES

from .backbones import BACKBONES, output
from .methods import METHODS, randomise


def tuned(backbone, config, **kwargs):
    model = get_peft_model(BACKBONES[backbone].build(**kwargs), config)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("layers", [0, (0,), range(1)])
def test_layers_to_transform_of_any_kind(layers, tmp_path):
    """A tuple or a range means the same before and after saving."""
    model = tuned("llama", UniPELTConfig(bottleneck_size=4, layers_to_transform=layers))
    assert {layer.site.layer for layer in tuner_layers(model)} == {0}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output(again, BACKBONES["llama"].inputs()), output(model, BACKBONES["llama"].inputs()))


def test_disabling_a_merged_adapter_gives_the_base():
    family = BACKBONES["bert"]
    model = tuned("bert", BitFitConfig())
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(output(model, family.inputs()), output(family.build(), family.inputs()))


def test_a_mask_changed_in_place():
    """Nothing is remembered of a mask from one forward to the next."""
    model = tuned("llama", LayerPrefixConfig(num_virtual_tokens=3))
    ids = BACKBONES["llama"].inputs()["input_ids"]
    mask = torch.ones(3, 1, 9, 9).tril().bool()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        mask[:, :, 5:, 0] = False
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids, attention_mask=mask.clone()).logits
        )


def test_mean_gates_with_a_static_cache():
    """The empty places behind the tokens are not taken for them."""
    model = tuned("llama", UniPELTConfig(bottleneck_size=4, gate_pooling="mean"))
    inputs = BACKBONES["llama"].inputs(padding="left")
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=20)
        name = next(name for name in CACHES if name in inspect.signature(model.get_base_model().forward).parameters)
        static = model(**inputs, **{name: cache}).logits
        torch.testing.assert_close(static, model(**inputs, use_cache=True).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("merge", [False, True])
def test_unloading_leaves_other_tuners(merge):
    """A LoRA that was in the model stays in it."""
    family = BACKBONES["llama"]
    base = inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False), family.build(), adapter_name="theirs"
    ).eval()
    with torch.no_grad():
        expected = output(base, family.inputs())
        model = get_peft_model(base, UniPELTConfig(methods=("lora",), gated=False), adapter_name="ours").eval()
        for module in base.modules():
            if hasattr(module, "lora_A"):
                module.set_adapter("theirs")
        left = model.merge_and_unload() if merge else model.unload()
        torch.testing.assert_close(output(left, family.inputs()), expected)
    assert sum(hasattr(module, "lora_A") for module in left.modules()) == 2
    assert not tuner_layers(left)


def test_biases_of_a_model_that_has_none():
    """Unmerging takes them away again; merging for good warns that saving loses them."""
    model = tuned("llama", BitFitConfig())
    model.merge_adapter()
    model.unmerge_adapter()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.bias is None
    with pytest.warns(UserWarning, match="has biases that its class does not build"):
        model.merge_and_unload()


def test_a_forward_leaves_nothing_to_copy():
    """An exception in the middle of a parallel adapter's span does not keep the model from being copied."""
    model = tuned("bert", MAMConfig(bottleneck_size=4))
    output_module = model.base_model.model.encoder.layer[1].output

    def fail(*args):
        raise RuntimeError("stop")

    handle = output_module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(**BACKBONES["bert"].inputs())
    handle.remove()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(output(twin, BACKBONES["bert"].inputs()), output(model, BACKBONES["bert"].inputs()))


def test_padding_of_another_batch_is_forgotten():
    """Mean gates note the padding for a forward only."""
    family = BACKBONES["bert"]
    model = tuned("bert", UniPELTConfig(bottleneck_size=4))
    model.add_adapter("other", UniPELTConfig(bottleneck_size=4, gate_pooling="token"))
    randomise(model, "other")
    model.eval()
    with torch.no_grad():
        output(model, family.inputs())
        model.set_adapter("other")
        model.delete_adapter("default")
        two = {key: value[:2] for key, value in family.inputs().items()}
        expected = output(model, two)
        mixed = output(model, two, adapter_names=["other", "__base__"])
    torch.testing.assert_close(mixed[0], expected[0])


@pytest.mark.parametrize("method", METHODS)
def test_low_memory_loading_keeps_types(method, tmp_path):
    """The same types with and without low_cpu_mem_usage, wherever a sub-layer sits."""
    get_peft_model(BACKBONES["llama"].build().bfloat16(), METHODS[method]()).save_pretrained(tmp_path)
    types = []
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(
            BACKBONES["llama"].build().bfloat16(),
            tmp_path,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=False,
        )
        types.append({name: p.dtype for name, p in model.named_parameters() if "sublayer_of" in name})
    assert types[0] == types[1]
    assert set(types[0].values()) == {torch.bfloat16}


def test_all_linear_is_saved_as_the_leaves_it_meant(tmp_path):
    model = tuned("bert", UniPELTConfig(methods=("lora",), target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BACKBONES["bert"].build(), tmp_path)
    assert [layer.site.host for layer in tuner_layers(again)] == [layer.site.host for layer in tuner_layers(model)]


def test_every_gate_has_its_own_name():
    """Also where one rule puts gates on many leaves of a layer; fixed, they all merge."""
    model = tuned("bert", UniPELTConfig(methods=("lora",), target_modules="all-linear"))
    values = gate_values(model, BACKBONES["bert"].inputs())
    assert len(values) == len(tuner_layers(model)) == 12
    fix_gates(model, BACKBONES["bert"].inputs())
    model.merge_and_unload()


def test_fixed_gates_leave_padding_out():
    """What stands in the padding does not change the constants."""
    family = BACKBONES["llama"]
    inputs = family.inputs(padding="left")
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"])}
    means = [fix_gates(tuned("llama", UniPELTConfig(methods=("lora",))), batch) for batch in (inputs, other)]
    assert means[0] == pytest.approx(means[1])


def test_gate_values_leave_modes_alone():
    model = tuned("bert", UniPELTConfig(bottleneck_size=4)).train()
    model.base_model.model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    gate_values(model, BACKBONES["bert"].inputs())
    assert [module.training for module in model.modules()] == modes


def test_an_attention_that_drops_keywords():
    """Siglip's attention takes keywords and does not pass them on: an error, not a prefix without effect."""
    config = AutoConfig.for_model(
        "siglip_vision_model",
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"image_size": 8, "patch_size": 4},
    )
    model = get_peft_model(AutoModel.from_config(config), LayerPrefixConfig(init="paper"))
    with pytest.raises(ValueError, match="`prefix` has no effect in SiglipAttention"):
        model(pixel_values=torch.randn(1, 3, 8, 8))


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))})])

    def forward(self, x):
        return x + self.body[0]["mlp"](x)


def test_a_host_that_runs_its_children():
    """In an nn.Sequential the tuner layer is a child among others and must pass on what it is given."""
    x = torch.randn(2, 8)
    model = Sequence()
    base = model(x)
    placement = Placement("bottleneck", "after_ffn", options={"r": 2, "init": "lora"})
    tuned_model = get_peft_model(model, ComposedConfig(placements=[placement], sites={"after_ffn": ["mlp"]}))
    torch.testing.assert_close(tuned_model(x), base)


def test_a_merge_that_is_cut_short(monkeypatch):
    """Whatever stops a merge, no layer stays merged."""
    from hf_peft_ext.attach import layer as layers

    family = BACKBONES["bert"]
    model = tuned("bert", BitFitConfig())
    merge_sublayer, calls = layers.merge_sublayer, []

    def failing(layer, sublayer, sign, safe):
        calls.append(layer)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        merge_sublayer(layer, sublayer, sign, safe)

    monkeypatch.setattr(layers, "merge_sublayer", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.merge_adapter()
    assert not any(layer.merged for layer in tuner_layers(model))
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(output(model, family.inputs()), output(family.build(), family.inputs()))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_lora_put_on_top_does_not_change_our_keys():
    """A leaf that peft's LoRA wraps after us keeps the keys that a bare base model has."""
    from peft import get_peft_model_state_dict

    model = inject_adapter_in_model(UniPELTConfig(methods=("lora",)), BACKBONES["llama"].build(), adapter_name="ours")
    keys = get_peft_model_state_dict(model, adapter_name="ours").keys()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model, adapter_name="theirs")
    assert {key for key in get_peft_model_state_dict(model, adapter_name="ours") if "sublayer_of" in key} == set(keys)


def test_folding_names_the_adapter():
    model = tuned("bert", LayerPrefixConfig(prefix_projection=True, encoder_hidden_size=8))
    inputs = BACKBONES["bert"].inputs()
    with torch.no_grad():
        before = output(model, inputs)
        with pytest.raises(ValueError, match=r"`adapter_name` \(='nope'\) must be one of \['default'\]"):
            merge_prefix_projections(model, "nope")
        assert merge_prefix_projections(model) == 2
        assert merge_prefix_projections(model) == 0
        torch.testing.assert_close(output(model, inputs), before)


def test_chunked_feed_forward():
    """A mean over a chunk of an example would be another mean."""
    model = BACKBONES["bert"].build(chunk_size_feed_forward=4)
    with pytest.raises(ValueError, match=r"`chunk_size_feed_forward` \(=4\) must be 0"):
        get_peft_model(model, UniPELTConfig(bottleneck_size=4))
