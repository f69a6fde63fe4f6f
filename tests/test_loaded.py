"""PeftModel.from_pretrained and .load_adapter with files of our types: a tensor that is missing or of another shape is
refused by its name, for every method and every tensor of it, and the model is what it was, down to its hooks; where
peft has a rule of its own (prefixes saved plain, `ignore_mismatched_sizes`, LoRA's warning), it holds.

Fields of a later version are ignored with a warning, as peft does with its own types.
"""

import json

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_peft_ext import LadderConfig, UniPELTConfig, load_adapter

from .backbones import BACKBONES, SPECIAL, VOCAB, output
from .methods import METHODS, randomise
from .saved_adapters import fingerprint, reweigh, rewrite, saved

METHOD_CONFIGS = {**METHODS, "ladder": lambda **kw: LadderConfig(r=2, **kw)}
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:The saved prefixes are plain")


def refused(folder, key, build, message="lacks tensors"):
    """The file is refused with an error that names the tensor, and the model is as before."""
    base = build()
    before, trained = fingerprint(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message) as error:
        PeftModel.from_pretrained(base, folder)
    assert key in str(error.value)
    assert fingerprint(base) == before
    assert [p.requires_grad for p in base.parameters()] == trained


def cut(tensors, key):
    """One row less."""
    tensors[key] = tensors[key].reshape(-1)[: tensors[key].numel() // 2].clone()


@pytest.mark.parametrize("method", METHOD_CONFIGS)
@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_every_tensor_is_asked_for(method, backbone, tmp_path):
    """One kind of tensor after the other is missing, from the first layer that has it."""
    build = BACKBONES[backbone].build
    saved(tmp_path, METHOD_CONFIGS[method](), backbone)
    whole = load_file(tmp_path / WEIGHTS)
    for key in {key.rpartition("layers")[2].rpartition("_of.")[2]: key for key in whole}.values():
        save_file({k: tensor for k, tensor in whole.items() if k != key}, tmp_path / WEIGHTS)
        refused(tmp_path, key, build)
    save_file(whole, tmp_path / WEIGHTS)
    PeftModel.from_pretrained(build(), tmp_path)


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_another_shape(method, tmp_path):
    """Nothing is copied, whichever tensor comes first."""
    saved(tmp_path, METHOD_CONFIGS[method]())
    key = max(load_file(tmp_path / WEIGHTS), key=lambda key: load_file(tmp_path / WEIGHTS)[key].numel())
    reweigh(tmp_path, lambda tensors: cut(tensors, key))
    refused(tmp_path, key, BACKBONES["llama"].build, "has shape .* but its config implies")


def classifier():
    tiny = AutoConfig.for_model("bert", vocab_size=VOCAB, num_labels=2, **SPECIAL, **BACKBONES["bert"].config)
    return AutoModelForSequenceClassification.from_config(tiny)


TOKENS = {"trainable_token_indices": [3, 4]}


@pytest.mark.parametrize(
    ("method", "fields", "part"),
    [
        ("unipelt", TOKENS, "classifier.weight"),
        ("unipelt", TOKENS, "token_adapter"),
        ("ladder", {}, "classifier.bias"),
    ],
)
def test_what_peft_saves_whole(method, fields, part, tmp_path):
    """Heads and trained tokens: peft alone ends in a KeyError."""
    get_peft_model(classifier(), METHOD_CONFIGS[method](task_type="SEQ_CLS", **fields)).save_pretrained(tmp_path)
    keys = [key for key in load_file(tmp_path / WEIGHTS) if part in key]
    reweigh(tmp_path, lambda tensors: tensors.pop(keys[0]))
    torch.manual_seed(0)
    base = classifier()
    before = fingerprint(base)
    with pytest.raises(ValueError, match=f"lacks tensors: {keys[0]}"):
        PeftModel.from_pretrained(base, tmp_path)
    assert fingerprint(base) == before


def test_a_further_adapter_is_taken_off_again(tmp_path):
    """The model keeps its first adapter, its active one, and its logits."""
    saved(tmp_path, METHODS["unipelt"]())
    reweigh(tmp_path, lambda tensors: tensors.pop(sorted(tensors)[0]))
    model = get_peft_model(BACKBONES["llama"].build(), METHODS["unipelt"]()).eval()
    randomise(model)
    names, before = [name for name, _ in model.named_parameters()], output(model, BACKBONES["llama"].inputs())
    with pytest.raises(ValueError, match="lacks tensors"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == [model.active_adapter] == ["default"]
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(output(model, BACKBONES["llama"].inputs()), before)


@pytest.mark.parametrize("broken", [lambda t: t.pop(sorted(t)[-1]), lambda t: cut(t, sorted(t)[-1])])
def test_an_adapter_that_is_there_keeps_its_weights(broken, tmp_path):
    """Trainer's best model is loaded over the last one: all of it, or nothing."""
    saved(tmp_path, METHODS["unipelt"]())
    reweigh(tmp_path, broken)
    model = get_peft_model(BACKBONES["llama"].build(), METHODS["unipelt"]())
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"adapter.s file|has shape"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_onto_a_model_that_has_another_tuner(tmp_path):
    """LoRA below stays."""
    saved(tmp_path, METHODS["unipelt"]())
    lora = get_peft_model(BACKBONES["llama"].build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = output(lora.eval(), BACKBONES["llama"].inputs())
    reweigh(tmp_path, lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(ValueError, match="lacks tensors"), pytest.warns(UserWarning, match="multiple adapters"):
        PeftModel.from_pretrained(lora.base_model.model, tmp_path, adapter_name="ours")
    assert torch.equal(output(lora, BACKBONES["llama"].inputs()), before)


def test_low_memory(tmp_path):
    """Where the adapter is built on the meta device."""
    saved(tmp_path, METHODS["mam"]())
    PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path, low_cpu_mem_usage=True)
    reweigh(tmp_path, lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(ValueError, match="lacks tensors"):
        PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path, low_cpu_mem_usage=True)


def test_what_may_be_missing(tmp_path):
    """peft's own ways stay: sizes that the user says to ignore, a dictionary that holds a part, LoRA's warning."""
    saved(tmp_path / "ours", METHODS["unipelt"]())
    reweigh(tmp_path / "ours", lambda tensors: cut(tensors, sorted(tensors)[0]))
    with (
        pytest.warns(UserWarning, match="being ignored because you passed `ignore_mismatched_sizes=True`"),
        pytest.warns(UserWarning, match="Found missing adapter keys"),
    ):
        PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path / "ours", ignore_mismatched_sizes=True)
    model = get_peft_model(BACKBONES["llama"].build(), METHODS["unipelt"]())
    part = dict(sorted(get_peft_model_state_dict(model).items())[1:])
    assert any("sublayer_of" in key for key in set_peft_model_state_dict(model, part).missing_keys)
    saved(tmp_path / "lora", LoraConfig(target_modules=["q_proj"]))
    reweigh(tmp_path / "lora", lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path / "lora")


def test_trained_tokens_unload():
    """The embedding is the one of before, as with LoRA."""
    for config in (METHODS["unipelt"](**TOKENS), LoraConfig(target_modules=["q_proj"], **TOKENS)):
        base = BACKBONES["llama"].build()
        embedding, weight = base.get_input_embeddings(), base.get_input_embeddings().weight.clone()
        assert get_peft_model(base, config).unload().get_input_embeddings() is embedding
        assert torch.equal(embedding.weight, weight)


# Fields of a later version


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_a_field_of_a_later_version(method, tmp_path):
    """By each way that reads the config; the adapter is the same."""
    saved(tmp_path, METHOD_CONFIGS[method]())
    config = PeftConfig.from_pretrained(tmp_path)
    rewrite(tmp_path, later_number=3, later_list=[1], later_flag=True, later_unused=None)
    for reads in (PeftConfig.from_pretrained, type(config).from_pretrained):
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \[.*'later_flag', 'later_list'"):
            assert reads(tmp_path) == config
    with pytest.warns(UserWarning, match="for class .*, these are ignored"):
        model = PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        key: value for key, value in json.loads((tmp_path / "adapter_config.json").read_text()).items()
        if not key.startswith("later")
    }))  # fmt: skip
    again = PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("make", [METHODS["unipelt"], lambda: LoraConfig(target_modules=["q_proj"])])
def test_load_adapter_takes_a_later_field_only_unused(make, tmp_path):
    """The default of a field that is not known here is not known: null and nothing are taken, false with a warning."""
    saved(tmp_path, make())
    rewrite(tmp_path, later=None, later_list=[], later_text="", later_table={})
    load_adapter(BACKBONES["llama"].build(), tmp_path)
    rewrite(tmp_path, later_flag=False)
    with pytest.warns(UserWarning, match=r"`later_flag` \(=False\) are no fields of \w+ and were left out"):
        load_adapter(BACKBONES["llama"].build(), tmp_path)
    for used in (True, 0, 1, "x", [0], {"a": None}):
        rewrite(tmp_path, later_flag=used)
        with pytest.raises(ValueError, match=r"`later_flag` .* is not a field"):
            load_adapter(BACKBONES["llama"].build(), tmp_path)


def test_known_fields_of_a_file_are_checked_still(tmp_path):
    UniPELTConfig().save_pretrained(tmp_path)
    rewrite(tmp_path, r="four", later=3)
    with pytest.raises(ValueError, match="`r` \\(='four'\\) must be of type int"):
        UniPELTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [UniPELTConfig, LadderConfig])
def test_a_typo_in_python(make):
    """An error of both kinds that callers may expect, with what was meant."""
    for kind in (ValueError, TypeError):
        with pytest.raises(
            kind, match=r"`task_tipe` \(='SEQ_CLS'\) is not a field of \w+; did you mean `task_type`\?"
        ):
            make(task_tipe="SEQ_CLS")
