"""What peft and transformers offer around an adapter, each against the plain PeftModel or the base model.

transformers' own adapter methods, AutoPeft, status reports and configs: the adapter gives the same outputs either way.
"""

import copy
import json
import pickle

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftMixedModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file

from hf_peft_ext import ComposedConfig, Placement

from .backbones import BACKBONES, output
from .methods import METHODS, randomise
from .tuned_models import adds_adapters, asked, classifier, every_method, families, served, several, tuned

# transformers' adapter methods


@pytest.mark.skipif(served, reason="this transformers takes this peft")
def test_an_older_peft_is_named():
    """What such a transformers cannot do is an error before the model is touched; `get_peft_model` goes on working."""
    model = BACKBONES["bert"].build()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"version of PEFT you are using is not compatible.* >= {asked}"):
        model.add_adapter(METHODS["unipelt"]())
    assert [name for name, _ in model.named_modules()] == before
    get_peft_model(model, METHODS["unipelt"]())


@adds_adapters
@every_method
@families
def test_add_adapter_equals_peft_model(method, backbone):
    """`model.add_adapter` puts in what `get_peft_model` does: with equal weights, equal outputs."""
    _, inputs, expected = tuned(method, backbone)
    model = BACKBONES[backbone].build()
    model.add_adapter(METHODS[method](), adapter_name="task")
    randomise(model, "task")
    model.eval()
    assert model.active_adapters() == ["task"]
    with torch.no_grad():
        assert torch.equal(output(model, inputs), expected)


@every_method
@families
@pytest.mark.parametrize("name", ["default", "another"])
def test_load_adapter(method, backbone, name, tmp_path):
    """An adapter saved by a PeftModel loads into a bare transformers model, no key missing and none left over."""
    model, inputs, expected = tuned(method, backbone)
    model.save_pretrained(tmp_path)
    bare = BACKBONES[backbone].build()
    info = bare.load_adapter(str(tmp_path), adapter_name=name)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys
    saved, loaded = load_file(tmp_path / "adapter_model.safetensors"), get_peft_model_state_dict(bare, None, name)
    assert {key.removeprefix("base_model.model.") for key in saved} == loaded.keys()
    for key, value in loaded.items():
        assert torch.equal(value, saved[f"base_model.model.{key}"]), key
    with torch.no_grad():
        # transformers leaves the tensors where the file is mapped: at odd addresses products differ in the last bit
        torch.testing.assert_close(output(bare.eval(), inputs), expected, rtol=0, atol=1e-5)
        for parameter in bare.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(output(bare, inputs), expected)
        assert (output(bare, inputs) - output(BACKBONES[backbone].build(), inputs)).abs().max() > 1e-2


@adds_adapters
@several
@pytest.mark.parametrize("method", ["unipelt", "unipelt_aplb", "mam", "houlsby", "composed"])
@families
def test_set_disable_enable_delete(method, backbone):
    """transformers' switches: each adapter alone, none, again, and the base model's outputs after both are deleted."""
    _, inputs, first = tuned(method, backbone)
    model = BACKBONES[backbone].build()
    with torch.no_grad():
        base = output(model, inputs)
        for seed, name in enumerate(("one", "two")):
            model.add_adapter(METHODS[method](), adapter_name=name)
            randomise(model, name, seed=seed)
        model.eval()
        second = output(model, inputs)
        model.set_adapter("one")
        assert torch.equal(output(model, inputs), first)
        assert (second - first).abs().max() > 1e-3
        model.disable_adapters()
        assert torch.equal(output(model, inputs), base)
        model.enable_adapters()
        assert torch.equal(output(model, inputs), first)
        model.set_adapter("two")
        model.delete_adapter("one")
        assert not any(".one." in key for key in model.state_dict())
        assert torch.equal(output(model, inputs), second)
        model.delete_adapter("two")
        assert torch.equal(output(model, inputs), base)
        assert model.state_dict().keys() == BACKBONES[backbone].build().state_dict().keys()


@adds_adapters
@pytest.mark.parametrize("method", ["unipelt", "projected_prefix", "mam", "bitfit", "composed"])
@pytest.mark.parametrize("backbone", ["bert", "llama", "t5"])
def test_transformers_model_saves_and_loads_its_adapter(method, backbone, tmp_path):
    """`save_pretrained` of a transformers model writes the adapter; `from_pretrained` brings base and adapter back."""
    family = BACKBONES[backbone]
    family.build().save_pretrained(tmp_path / "base")
    cls = type(family.build())
    model = cls.from_pretrained(tmp_path / "base")
    model.add_adapter(METHODS[method]())
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    again = cls.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = output(model.eval(), family.inputs())
        torch.testing.assert_close(output(again, family.inputs()), expected, rtol=0, atol=1e-5)
        again.disable_adapters()
        assert torch.equal(output(again, family.inputs()), output(family.build(), family.inputs()))


@adds_adapters
@several
def test_two_active_adapters_differ_from_both():
    """With set_adapter([a, b]) both act, whatever the method."""
    model, inputs = BACKBONES["llama"].build(), BACKBONES["llama"].inputs()
    for seed, name in enumerate(("first", "second")):
        model.add_adapter(METHODS["unipelt"](), adapter_name=name)
        randomise(model, name, seed=seed)
    outputs = {}
    with torch.no_grad():
        for names in ("first", "second", ["first", "second"]):
            model.set_adapter(names)
            outputs[str(names)] = output(model.eval(), inputs)
    a, b, both = outputs.values()
    assert (both - a).abs().max() > 1e-2
    assert (both - b).abs().max() > 1e-2


@adds_adapters
@several
@pytest.mark.parametrize("sublayer", ["low_rank", "bias"])
def test_two_active_adapters_add_up(sublayer):
    """At one linear leaf, what both adapters add is the sum of what each adds (float64)."""
    model, inputs = BACKBONES["llama"].build().double(), BACKBONES["llama"].inputs()
    places = {
        "low_rank": Placement("low_rank", "query", layers=[0], options={"r": 2}),
        "bias": Placement("bias", "bias"),
    }
    for seed, name in enumerate(("first", "second")):
        model.add_adapter(ComposedConfig(placements=[places[sublayer]]), adapter_name=name)
        randomise(model, name, seed=seed)
    model.double()
    outputs, leaf = [], model.model.layers[0].self_attn.q_proj
    leaf.register_forward_hook(lambda *args: outputs.append(args[-1]))  # after the adapters' own hooks
    with torch.no_grad():
        for names in ("first", "second", ["first", "second"]):
            model.set_adapter(names)
            model(**inputs)
        model.disable_adapters()
        model(**inputs)
    a, b, both = (y - outputs[-1] for y in outputs[:-1])
    assert a.abs().max() > 0.1
    assert b.abs().max() > 0.1
    torch.testing.assert_close(both, a + b, rtol=0, atol=1e-13)


# peft's functions and Auto classes


@every_method
def test_inject_adapter_in_model(method):
    """Injected into a bare module, the adapter is there; its state dict holds exactly its own tensors."""
    peft_model, inputs, expected = tuned(method, "bert")
    model = inject_adapter_in_model(METHODS[method](), BACKBONES["bert"].build(), adapter_name="task")
    randomise(model, "task")
    with torch.no_grad():
        assert torch.equal(output(model.eval(), inputs), expected)
    state, full = get_peft_model_state_dict(model, adapter_name="task"), get_peft_model_state_dict(peft_model)
    assert state.keys() == {key.removeprefix("base_model.model.") for key in full}
    assert all(".task." not in key and ".sublayer_of." in key for key in state)


@pytest.mark.parametrize("method", ["unipelt", "mam", "houlsby", "bitfit"])
@pytest.mark.parametrize(
    ("backbone", "auto", "task_type"),
    [
        ("llama", AutoPeftModelForCausalLM, TaskType.CAUSAL_LM),
        ("t5", AutoPeftModelForSeq2SeqLM, TaskType.SEQ_2_SEQ_LM),
        ("bert", AutoPeftModelForSequenceClassification, TaskType.SEQ_CLS),
    ],
)
def test_auto_peft_model(method, backbone, auto, task_type, tmp_path):
    """AutoPeftModelFor... finds the base model and the adapter from the adapter's folder."""
    model, inputs = classifier() if backbone == "bert" else (BACKBONES[backbone].build(), BACKBONES[backbone].inputs())
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, METHODS[method](task_type=task_type))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    again = auto.from_pretrained(tmp_path / "adapter")
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(output(again.eval(), inputs), output(model.eval(), inputs))


def test_mixed_model_refuses():
    """PeftMixedModel is a closed list in peft: a clear error, and no trace in the model."""
    model, inputs = BACKBONES["bert"].build(), BACKBONES["bert"].inputs()
    with torch.no_grad():
        before = output(model, inputs)
        with pytest.raises(ValueError, match="not compatible"):
            PeftMixedModel(model, METHODS["unipelt"]())
        assert torch.equal(output(model, inputs), before)


@every_method
def test_status(method):
    """The status report knows the type, the layers and what is active, before and after disabling."""
    model, _, _ = tuned(method, "llama")
    status, layers = model.get_model_status(), model.get_layer_status()
    config = model.peft_config["default"]
    assert status.peft_types == {"default": config.method.upper()}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert len(layers) == status.num_adapter_layers > 0
    assert all(layer.available_adapters == ["default"] and layer.enabled for layer in layers)
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


# configs


@every_method
def test_config_round_trip(method, tmp_path):
    """A config survives its file, JSON, pickle and deepcopy, and is of the same class after each."""
    config = METHODS[method](layers_to_transform=[0, 1], modules_to_save=["head"], task_type=TaskType.CAUSAL_LM)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert again == config.stored()
    assert json.loads(json.dumps(config.to_dict()))["layers_to_transform"] == [0, 1]
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), type(config)(**config.to_dict())):
        assert twin == config
        assert twin.peft_type is config.peft_type
