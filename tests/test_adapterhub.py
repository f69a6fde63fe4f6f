"""Imported adapters against the logits of AdapterHub's own library (tests/adapterhub/make_fixtures.py wrote them)."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, XmodConfig

from hf_peft_ext import ComposedConfig, Placement, from_adapterhub

from .adapterhub.families import FAMILIES, MORE_FAMILIES, PLAIN, batch, build, outputs
from .backbones import BACKBONES

HERE = Path(__file__).parent / "adapterhub"
LIBRARY_LOGITS = {}
PAIRS = []
for family in FAMILIES | MORE_FAMILIES:
    with zipfile.ZipFile(HERE / f"{family}.zip") as archive:
        LIBRARY_LOGITS[family] = load(archive.read("logits.safetensors"))
    PAIRS += [(family, method) for method in sorted(LIBRARY_LOGITS[family]) if method != "base"]
PAIRS.remove(("t5", "compacter"))  # the library does not save all of it
every_pair = pytest.mark.parametrize(("family", "method"), PAIRS)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint for each family and method."""
    folder = tmp_path_factory.mktemp("adapterhub")
    for family in FAMILIES | MORE_FAMILIES:
        with zipfile.ZipFile(HERE / f"{family}.zip") as archive:
            archive.extractall(folder / family)
    return folder


def backbone(model):
    """The model below its head; T5 with a head holds its stacks itself."""
    return getattr(model, model.base_model_prefix, model)


@pytest.mark.filterwarnings("ignore:The library saves NoReFT and DiReFT alike:UserWarning")
@every_pair
def test_same_logits_as_the_library(family, method, checkpoints, tmp_path, record_property):
    """Equal to 1e-4, padding included, and after saving and loading with peft; disabled it is the base model."""
    model = from_adapterhub(checkpoints / family / method, build(family))
    result, expected = outputs(model, family), LIBRARY_LOGITS[family]
    difference = (result - expected[method]).abs().max().item()
    record_property("cell", (family, method))
    record_property("difference", difference)
    assert difference <= 1e-4
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(outputs(model, family), expected["base"], rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family), tmp_path)
    assert torch.equal(outputs(again, family), result)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_with_sdpa(family, checkpoints):
    model = from_adapterhub(checkpoints / family / "unipelt", build(family, "sdpa"))
    torch.testing.assert_close(outputs(model, family), LIBRARY_LOGITS[family]["unipelt"], rtol=0, atol=1e-4)


# method -> the type it becomes, by default and in some families
TYPES = {
    "seq_bn": ("BOTTLENECK", {}),
    "double_seq_bn": ("BOTTLENECK", {}),
    "par_bn": ("BOTTLENECK", dict.fromkeys(["gpt2", "llama", "t5"], "COMPOSED")),
    "prefix_tuning": ("LAYER_PREFIX", {"t5": "COMPOSED"}),
    "mam": ("MAM", dict.fromkeys(["gpt2", "llama", "t5"], "COMPOSED")),
    "unipelt": ("UNIPELT", {"t5": "COMPOSED"}),
    "lora": ("LORA", {}),
    "lora_everywhere": ("LORA", {}),
    "ia3": ("IA3", {}),
    "lora_and_double_seq_bn": ("COMPOSED", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", TYPES)
def test_types(family, method, checkpoints):
    """What stock peft can express becomes a stock type, what a named method says becomes that method."""
    usual, others = TYPES[method]
    model = from_adapterhub(checkpoints / family / method, build(family))
    assert model.peft_config["default"].peft_type == others.get(family, usual)


RARE_TYPES = {
    ("bert", "compacter"): "COMPACTER",
    ("bert", "compacter_own_rules"): "COMPOSED",
    ("bert", "inverse"): "COMPOSED",
    ("bert", "vera"): "LORA",
    ("llama", "dora"): "LORA",
}


@pytest.mark.parametrize(("family", "method"), RARE_TYPES)
def test_types_of_rare_methods(family, method, checkpoints):
    model = from_adapterhub(checkpoints / family / method, build(family))
    config = model.peft_config["default"]
    assert config.peft_type == RARE_TYPES[family, method]
    assert getattr(config, "use_dora", False) == (method == "dora")


def test_fused_lora_is_one_of_joint_rank(checkpoints):
    """GPT-2's query and value branches of rank 2 are one branch of rank 4 on c_attn, which peft can merge."""
    model = from_adapterhub(checkpoints / "gpt2" / "lora", build("gpt2"))
    config = model.peft_config["default"]
    assert (config.target_modules, config.r, config.rank_pattern) == ({"c_attn"}, 2, {"c_attn": 4})
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, "gpt2"), LIBRARY_LOGITS["gpt2"]["lora"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_without_head(family, checkpoints):
    """The adapter of a model with a head fits the model without one, and gives it the same hidden states."""
    whole = from_adapterhub(checkpoints / family / "unipelt", build(family))
    bare = from_adapterhub(checkpoints / family / "unipelt", AutoModel.from_config(build(family).config))
    bare.get_base_model().load_state_dict(backbone(build(family)).state_dict(), strict=False)
    with torch.no_grad():
        result = whole(**batch(family), output_hidden_states=True)
        last = result.get("hidden_states", result.get("decoder_hidden_states"))[-1]
        torch.testing.assert_close(bare.eval()(**batch(family))[0], last, rtol=0, atol=1e-5)


def test_gates_of_decoders_look_ahead(checkpoints):
    """Means over all tokens, later ones included: the last token changes the logits before it."""
    model, inputs = from_adapterhub(checkpoints / "llama" / "unipelt", build("llama")), batch("llama")
    changed = inputs["input_ids"].clone()
    changed[0, -1] = 3 if changed[0, -1] != 3 else 4
    with torch.no_grad():
        before, after = model(**inputs).logits, model(**{**inputs, "input_ids": changed}).logits
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-3


def test_name_and_training(checkpoints):
    """The adapter takes the name it is given; it is frozen and in evaluation mode unless it is to be trained."""
    folder = checkpoints / "bert" / "unipelt"
    model = from_adapterhub(folder, build("bert"), "mine")
    assert model.active_adapters == ["mine"]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = from_adapterhub(folder, build("bert").train(), "mine", is_trainable=True)
    assert model.training
    model(**batch("bert")).logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".mine." in name and model.get_parameter(name).grad is not None for name in trained)


def edited(folder, target, **changes):
    """A copy of a checkpoint with another config: fields of the file, or of the method in it."""
    shutil.copytree(folder, target)
    file = target / "adapter_config.json"
    saved = json.loads(file.read_text())
    for key, value in changes.items():
        (saved["config"] if key in saved["config"] else saved)[key] = value
    file.write_text(json.dumps(saved))
    return target


def test_alpha_of_old_versions(checkpoints, tmp_path):
    """Before 1.1.0 the library scaled a LoRA by 1 whatever its alpha was."""
    folder = edited(checkpoints / "bert" / "lora", tmp_path / "old", version="adapters.1.0.1")
    assert from_adapterhub(folder, build("bert")).peft_config["default"].lora_alpha == 2


ERRORS = {
    "reft": ("loreft", {"output_reft": False}, "`output_reft` (=False) must be True."),
    "prompt": ("prompt_tuning", {"combine": "suffix"}, "`combine` (='suffix') must be one of prefix, prefix_after"),
    "prompt_union": (
        "mam",
        {"configs": [{"architecture": "prompt_tuning"}, {}]},
        "`architecture` (='prompt_tuning') must not be in a union.",
    ),
    "mtl": (
        "lora",
        {"architecture": "mtl_lora"},
        "`architecture` (='mtl_lora') cannot be imported: peft has no matrices of single tasks in a LoRA.",
    ),
    "plus": ("seq_bn", {"original_ln_after": False}, "`residual_before_ln` (=True) must be False with these norms."),
    "plus_here": (
        "seq_bn",
        {"original_ln_after": False, "residual_before_ln": False},
        "`original_ln_after` (=False) must be True in models with norms after residuals.",
    ),
    "plus_beside": ("par_bn", {"original_ln_after": False}, "`original_ln_after` (=False) must be True"),
    "residual": ("seq_bn", {"residual_before_ln": "post_add"}, "`residual_before_ln` (='post_add') must be True with"),
    "residual_first": ("seq_bn", {"adapter_residual_before_ln": True}, "`adapter_residual_before_ln` (=True) must be"),
    "one_matrix": ("seq_bn", {"shared_W_phm": True}, "`shared_W_phm` (=True) must be False."),
    "whole_factor": ("seq_bn", {"factorized_phm_W": False}, "`factorized_phm_W` (=False) must be True."),
    "glow": (
        "seq_bn",
        {"inv_adapter": "glow"},
        "`inv_adapter` (='glow') must be None or 'nice'; the library's others",
    ),
    "dora": ("lora", {"use_dora": True}, "`use_dora` (=True) must be False where leaves have a bias, as bert.encoder"),
    "scaled_phm": (
        "compacter",
        {"scaling": "channel"},
        "`scaling` (='channel') must be absent with `phm_layer`, `ln_before` or `ln_after`.",
    ),
    "other": ("lora", {"architecture": "new"}, "`architecture` (='new') must be None (a bottleneck), 'lora', 'prefix"),
    "model_type": (
        "seq_bn",
        {"model_type": "roberta"},
        "`model_type` (='roberta') must equal the model's, 'bert'.",
    ),
    "hidden_size": ("seq_bn", {"hidden_size": 768}, "`hidden_size` (=768) must equal the model's, 16."),
    "no_config": ("seq_bn", {"config": None}, "holds no adapter saved by AdapterHub's library."),
    "beside": ("par_bn", {"mh_adapter": True}, "`mh_adapter` (=True) must be False with `is_parallel` or"),
    "twice": ("seq_bn", {"mh_adapter": True}, "`mh_adapter` (=True) must be False with `is_parallel` or"),
    "activation": (
        "seq_bn",
        {"non_linearity": "tan"},
        "`non_linearity` (='tan') must be an activation of transformers.",
    ),
    "gated_ia3": ("ia3", {"use_gating": True}, "`use_gating` (=True) must be False for (IA)^3."),
    "ia3_union": (
        "mam",
        {"configs": [{"architecture": "lora", "composition_mode": "scale"}, {}]},
        "`composition_mode` (='scale') must be 'add' in a union.",
    ),
    "two_gates": ("prefix_tuning", {"shared_gating": False}, "`shared_gating` (=False) must be True."),
    "length": (
        "prefix_tuning",
        {"prefix_length": 5},
        "`size of self_prefix` (=192) must be 5 x 2 x 2 x 2 x 8: tokens",
    ),
    "empty": ("seq_bn", {"leave_out": [0, 1]}, "`leave_out` (=[0, 1]) must leave at least one layer."),
    "nothing": ("seq_bn", {"output_adapter": False}, "`architecture` (=None) selects nothing in this model."),
    "no_matrix": (
        "ia3",
        {"attn_matrices": [], "intermediate_lora": False},
        "`attn_matrices` (=[]) selects nothing in this",
    ),
    "lacking": (
        "lora",
        {"attn_matrices": ["q", "k", "v"]},
        "no tensor encoder.layer.0.attention.self.key.loras.lora_A",
    ),
    "left_over": ("lora", {"attn_matrices": ["q"]}, "has 4 tensors with no place in this model: encoder.layer.0.att"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, checkpoints, tmp_path):
    """What cannot be imported is said before the model is touched."""
    method, changes, message = ERRORS[case]
    folder = edited(checkpoints / "bert" / method, tmp_path / case, **changes)
    model = build("bert")
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=re.escape(message)):
        from_adapterhub(folder, model)
    assert list(model.named_modules()) == modules
    assert torch.equal(outputs(model, "bert"), outputs(build("bert"), "bert"))


def test_other_folders(checkpoints, tmp_path):
    """No folder, one of peft, one without weights, a model of another family, one with an adapter."""
    with pytest.raises(ValueError, match=re.escape("must be a folder with an adapter_config.json.")):
        from_adapterhub(tmp_path / "nothing", build("bert"))
    model = from_adapterhub(checkpoints / "bert" / "lora", build("bert"))
    with pytest.raises(ValueError, match=re.escape("`model` (='PeftModel') must be a model without adapters.")):
        from_adapterhub(checkpoints / "bert" / "lora", model)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=re.escape("holds an adapter of peft; load it with PeftModel.from_pretrained")
    ):
        from_adapterhub(tmp_path, build("bert"))
    folder = edited(checkpoints / "bert" / "lora", tmp_path / "bare")
    (folder / "adapter.safetensors").unlink(missing_ok=True)
    (folder / "pytorch_adapter.bin").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=re.escape("must hold adapter.safetensors or pytorch_adapter.bin.")):
        from_adapterhub(folder, build("bert"))
    with pytest.raises(ValueError, match=re.escape("`model_type` (='bert') must equal the model's, 'opt'.")):
        from_adapterhub(folder, BACKBONES["opt"].build())
    with pytest.raises(ValueError, match=re.escape("`model` (='Linear') must be a model of transformers.")):
        from_adapterhub(folder, torch.nn.Linear(2, 2))


# (family, method, changes) -> what cannot be imported into this family, and why
FAMILY_ERRORS = {
    ("gptj", "seq_bn", "is_parallel=True"): "`is_parallel` (=True) must be False in this model, where no norm reads",
    ("deberta", "lora_everywhere", "use_gating=True"): "`architecture` (='lora') must be alone and without a gate in",
    (
        "t5",
        "compacter",
        "cross_adapter=False",
    ): "`shared_phm_rule` (=True) must be False here: the checkpoint lacks the",
    ("gpt2", "lora", "vera_d=1"): "`vera_d` (=1) must be None on fused leaves.",
    ("deberta", "lora_everywhere", "use_dora=True"): "`use_dora` (=True) must be False where leaves have a bias",
    ("electra", "lora_everywhere", "intermediate_lora=False"): "`output_lora` (=True) must have one branch in the FFN",
}


@pytest.mark.parametrize(("family", "method", "change"), FAMILY_ERRORS)
def test_errors_of_families(family, method, change, checkpoints, tmp_path):
    """What the structure of a model does not allow."""
    key, _, value = change.partition("=")
    folder = edited(
        checkpoints / family / method, tmp_path / "edited", **{key: {"True": True, "False": False}.get(value, 1)}
    )
    if key == "use_gating":
        state = load_adapter(folder)
        for name in [name for name in state if name.endswith("lora_A")]:
            gates = 3 if "in_proj" in name else 1
            state |= {name.replace("lora_A", "gate.weight"): torch.ones(gates, state[name].shape[1])}
            state |= {name.replace("lora_A", "gate.bias"): torch.ones(gates)}
        save_adapter(folder, state)
    with pytest.raises(ValueError, match=re.escape(FAMILY_ERRORS[family, method, change])):
        from_adapterhub(folder, build(family))


def load_adapter(folder):
    """The tensors of a checkpoint."""
    file = folder / "adapter.safetensors"
    return load_file(file) if file.exists() else torch.load(folder / "pytorch_adapter.bin", weights_only=True)


def save_adapter(folder, state):
    """Write the tensors of a checkpoint."""
    (folder / "pytorch_adapter.bin").unlink(missing_ok=True)
    save_file(state, folder / "adapter.safetensors")


@pytest.mark.parametrize("family", ["deberta", "deberta-v2"])
def test_no_prefix_in_deberta(family, checkpoints, tmp_path):
    folder = edited(checkpoints / "bert" / "prefix_tuning_flat", tmp_path / "other", model_type=family)
    with pytest.raises(ValueError, match=r"must be another method: attention of .* takes no further keys and values"):
        from_adapterhub(folder, build(family))


def test_no_language_adapters_of_x_mod(checkpoints, tmp_path):
    """The library deletes them, so its adapters are for another model."""
    folder = edited(checkpoints / "bert" / "seq_bn", tmp_path / "other", model_type="xmod")
    model = AutoModelForMaskedLM.from_config(XmodConfig(**PLAIN, vocab_size=24, languages=["en_XX"]))
    message = "`model_type` (='xmod') must be another one: the library removes X-MOD's language adapters."
    with pytest.raises(ValueError, match=re.escape(message)):
        from_adapterhub(folder, model)


NO_PROMPT = {
    "llama": "must be another one with a decoder, whose cache has no prompt",
    "bart": "must be another one with a decoder, whose cache has no prompt",
    "deberta": "must be another one for a prompt, which in the library attends to padding in DeBERTa",
}


@pytest.mark.parametrize("family", NO_PROMPT)
def test_models_without_a_prompt(family, checkpoints, tmp_path):
    """The library has none in decoders either."""
    folder = edited(checkpoints / "bert" / "prompt_tuning", tmp_path / "other", model_type=family)
    save_adapter(folder, {name.removeprefix("bert."): tensor for name, tensor in load_adapter(folder).items()})
    model = build(family)
    with pytest.raises(ValueError, match=NO_PROMPT[family]):
        from_adapterhub(folder, model)
    assert torch.equal(outputs(model, family), outputs(build(family), family))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompt(attention, checkpoints):
    """A prompt lengthens masks of every kind, in the backbone by itself too, and can be trained; rows cannot mix."""
    model = from_adapterhub(checkpoints / "bert" / "prompt_tuning", build("bert", attention), is_trainable=True).eval()
    inputs = batch("bert")
    expected = LIBRARY_LOGITS["bert"]["prompt_tuning"]
    positional = model.get_base_model()(inputs["input_ids"], inputs["attention_mask"].bool()).logits
    torch.testing.assert_close(positional, expected, rtol=0, atol=1e-4)
    unpadded = {**inputs, "attention_mask": None}
    whole = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    torch.testing.assert_close(model(**unpadded).logits, model(**whole).logits, rtol=0, atol=1e-5)
    model(**inputs).logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"base_model.model.bert.embeddings.embeddings_prompt.sublayer_of.default.P"}
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in trained)
    with pytest.raises(ValueError, match=re.escape("must have the shape (batch, length) with a prompt")):
        model(**{**inputs, "attention_mask": inputs["attention_mask"][:, None]})
    with pytest.raises(ValueError, match="must be None with a prompt"):
        model(**inputs, adapter_names=["default"] * 3)
    bare = build("bert", attention, auto=AutoModel)
    bare.load_state_dict(backbone(build("bert")).state_dict(), strict=False)
    bare = from_adapterhub(checkpoints / "bert" / "prompt_tuning", bare)
    assert bare(**inputs).last_hidden_state.shape == (3, 10, 16)


def test_layers_of_two_models(checkpoints, tmp_path):
    """In an encoder-decoder of two models, the library counts the layers of each from 0."""
    folder = edited(checkpoints / "encoder-decoder" / "seq_bn", tmp_path / "some", leave_out=[0])
    state = load_adapter(folder)
    save_adapter(folder, {key: tensor for key, tensor in state.items() if ".layer.0." not in key})
    model = from_adapterhub(folder, build("encoder-decoder"))
    assert model.peft_config["default"].layers_to_transform == [1, 3]


def test_layer_scale(checkpoints):
    """A bottleneck in front of a zero layer scale has no equal."""
    model = build("beit")
    model.beit.layers[1].lambda_1.data[3] = 0.0
    with pytest.raises(ValueError, match=re.escape("`layer_scale` (=0.0) must not be 0 in beit.layers.1.")):
        from_adapterhub(checkpoints / "beit" / "double_seq_bn", model)


def test_prefixes_in_some_layers_of_t5(checkpoints, tmp_path):
    folder = edited(checkpoints / "t5" / "prefix_tuning", tmp_path / "some", leave_out=[0])
    with pytest.raises(ValueError, match=re.escape("`leave_out` (=[0]) must be empty for prefixes in T5")):
        from_adapterhub(folder, build("t5"))


def test_other_shapes(checkpoints):
    """A model of the same hidden size whose FFN or number of layers is another."""
    config = build("bert").config
    config.intermediate_size = 24
    message = "`shape of low_rank B` (=(20, 2)) must be (24, 2), as at bert.encoder.layer.0.intermediate.dense."
    with pytest.raises(ValueError, match=re.escape(message)):
        from_adapterhub(checkpoints / "bert" / "lora_everywhere", AutoModelForMaskedLM.from_config(config))
    config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"has 4 tensors with no place in this model: encoder\.layer\.1"):
        from_adapterhub(checkpoints / "bert" / "seq_bn", AutoModelForMaskedLM.from_config(config))


def test_prompt_in_deberta():
    """Its embeddings read the mask."""
    config = ComposedConfig(placements=[Placement("prompt", "embeddings")], sites={"embeddings": ["embeddings"]})
    with pytest.raises(ValueError, match=re.escape("must be another one: deberta.embeddings reads the mask.")):
        get_peft_model(build("deberta-v2"), config)
    with pytest.raises(ValueError, match=re.escape("`position` (='last') must be one of first, second.")):
        Placement("prompt", "embeddings", options={"position": "last"})


def test_direft_is_saved_as_noreft(checkpoints, tmp_path):
    """The library's files do not tell them apart; a field that the user adds does."""
    with pytest.warns(UserWarning, match="The library saves NoReFT and DiReFT alike"):
        from_adapterhub(checkpoints / "bert" / "noreft", build("bert"))
    folder = edited(checkpoints / "bert" / "noreft", tmp_path / "direft")
    file = folder / "adapter_config.json"
    saved = json.loads(file.read_text())
    saved["config"]["subtract_projection"] = False
    file.write_text(json.dumps(saved))
    (placement,) = from_adapterhub(folder, build("bert")).peft_config["default"].placements
    assert placement.options["subtract_projection"] is False
