"""Ladders among what surrounds them: errors before anything changes, checked loading, 4-bit backbones, trainers."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainingArguments

from hf_peft_ext import LadderConfig, load_adapter
from hf_peft_ext.trainers import AdapterTrainer

from .backbones import BACKBONES, output
from .methods import randomise
from .saved_adapters import assert_equal_to_stock, fingerprint, refused, reweigh, rewrite, saved
from .test_ladder import every_family, gradients, laddered

# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"`r` \(=0\) must be a positive number\."),
        ({"r": 0.5}, r"`r` \(=0\.5\) must be at least 1\."),
        ({"reduce": "depth"}, r"`reduce` \(='depth'\) must be one of width, parameters\."),
        ({"temperature": -1}, r"`temperature` \(=-1\) must be a positive number\."),
        (
            {"layers_to_keep": [-1]},
            r"`layers_to_keep` \(=\[-1\]\) must be a layer index or a list of them, 0 or more\.",
        ),
        ({"layers_to_keep": []}, r"`layers_to_keep` \(=\[\]\) must be a layer index"),
        (
            {"target_modules": ["q"]},
            r"`target_modules` \(=\['q'\]\) must be None: a ladder reads whole blocks",
        ),
        ({"bias": "all"}, r'`bias` \(=\'all\'\) must be "none"'),
        ({"layers": [1]}, r"`layers` \(=\[1\]\) is not a field of LadderConfig"),
    ],
)
def test_config(fields, message):
    with pytest.raises(ValueError, match=message):
        LadderConfig(**fields)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {"layers_to_keep": [0, 2]}, r"names layer 2, which does not exist; this model has layers 0 to 1\."),
        ("t5", {"layers_to_keep": [0, 1]}, r"keeps none of the layers 2 to 3, but each backbone needs a side block\."),
        (
            "llama",
            {"modules_to_save": ["mlp"]},
            r"names model.layers.0.mlp, a part of the backbone, which no gradient",
        ),
        ("llama", {"modules_to_save": ["layers"]}, r"names model.layers, a part of the backbone"),
    ],
)
def test_refused_models_are_left_as_they_were(family, fields, message):
    base = BACKBONES[family].build()
    before = fingerprint(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LadderConfig(r=4, **fields))
    assert fingerprint(base) == before


def test_a_refused_second_adapter():
    model, inputs = laddered("gpt2")
    with torch.no_grad():
        expected = output(model, inputs)
        with pytest.raises(ValueError, match="names layer 7"):
            model.add_adapter("other", LadderConfig(layers_to_keep=7))
        assert torch.equal(output(model, inputs), expected)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"`adapter_name` \(='a.b'\) must have 1 to 200 characters"):
        model.add_adapter("a.b", LadderConfig())


def test_an_adapter_called_like_a_part_of_a_ladder(tmp_path):
    model, inputs = laddered("gpt2")
    model.add_adapter("block", LadderConfig())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = output(model, inputs)
        loaded = PeftModel.from_pretrained(BACKBONES["gpt2"].build(), tmp_path).eval()
        assert torch.equal(output(loaded, inputs), expected)


def test_what_a_ladder_cannot_do():
    model, inputs = laddered("gpt2")
    with pytest.raises(ValueError, match=r"`adapter_names` \(=\['default', '__base__', 'default'\]\) must be None"):
        model(**inputs, adapter_names=["default", "__base__", "default"])
    with pytest.raises(ValueError, match="A ladder is a separate network"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=r"`adapter_name` \(=\['default', 'other'\]\) must be a single one"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(TypeError, match="`model` must be a transformers model, not Sequential"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LadderConfig())


# Loading


@every_family
def test_checked_loading(family, tmp_path):
    """`load_adapter` gives what stock peft gives."""
    config = LadderConfig(r=4, layers_to_keep=[1, 3] if family == "t5" else [1])
    assert_equal_to_stock(saved(tmp_path, config, family), BACKBONES[family])


def test_checked_loading_of_a_second_adapter(tmp_path):
    model, inputs = laddered("llama")
    load_adapter(model, saved(tmp_path, LadderConfig(r=2)), "other")
    model.set_adapter("other")
    with torch.no_grad():
        alone = PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
        assert torch.equal(output(model, inputs), output(alone, inputs))


def test_refused_files(tmp_path):
    """What the config does not imply, in the config or in the weights; the base model stays as it was."""
    folder = saved(tmp_path, LadderConfig(r=4))
    refused(rewrite(folder, r=2), "has shape")
    refused(rewrite(folder, r=4, layers_to_keep=[0]), "holds tensors that its config does not imply")
    refused(rewrite(folder, layers_to_keep=[9]), "names layer 9")
    refused(
        rewrite(folder, layers_to_keep=None, modules_to_save=["mlp"]),
        "names model.layers.0.mlp, a part of the backbone",
    )
    rewrite(folder, modules_to_save=None)

    def overwrite(tensors):
        tensors["base_model.model.lm_head.weight"] = torch.zeros(60, 32)

    refused(reweigh(folder, overwrite), "holds tensors that its config does not imply: base_model.model.lm_head")
    with pytest.raises(ValueError, match="holds tensors that are no part of the adapter"):
        PeftModel.from_pretrained(BACKBONES["llama"].build(), folder)


# Surroundings


def test_trained_tokens_and_pooler(tmp_path):
    """Rows of the embedding are trained through the side network alone; BERT's pooler comes behind it."""
    extra = {"llama": {"trainable_token_indices": [3, 4]}, "bert": {"modules_to_save": ["pooler"]}}
    for family, fields in extra.items():
        model = get_peft_model(BACKBONES[family].build(), LadderConfig(r=4, **fields)).eval()
        randomise(model)
        inputs = BACKBONES[family].inputs()
        inputs["input_ids"][0, :2] = torch.tensor([3, 4])
        found = gradients(model, inputs)
        if family == "llama":
            assert any("trainable_tokens_delta" in name and g.abs().max() > 0 for name, g in found.items())
        model.save_pretrained(tmp_path / family)
        again = PeftModel.from_pretrained(BACKBONES[family].build(), tmp_path / family).eval()
        with torch.no_grad():
            assert torch.equal(output(again, inputs), output(model, inputs))


def test_four_bit(tmp_path):
    """An NF4 backbone, prepared as for LoRA: pruned from its weights, trained, evaluated, trained again, reloaded."""
    pytest.importorskip("bitsandbytes")
    BACKBONES["llama"].build(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def base():
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four, device_map={"": "cpu"})
        return prepare_model_for_kbit_training(loaded, gradient_checkpointing_kwargs={"use_reentrant": False})

    model = get_peft_model(base(), LadderConfig(r=4))
    randomise(model)
    inputs = BACKBONES["llama"].inputs()
    first = gradients(model.train(), inputs, use_cache=False)
    with torch.no_grad():
        expected = output(model.eval(), inputs)
    again = gradients(model.train(), inputs, use_cache=False)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    model.save_pretrained(tmp_path / "adapter")
    for load in (PeftModel.from_pretrained, load_adapter):
        with torch.no_grad():
            torch.testing.assert_close(output(load(base(), tmp_path / "adapter").eval(), inputs), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing, tmp_path):
    """It learns to name the token before the last; the adapter, its card and a checkpoint are saved."""
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 8, (64, 1)).expand(-1, 8)]
    settings = TrainingArguments(
        str(tmp_path), max_steps=30, save_steps=15, learning_rate=1e-2, per_device_train_batch_size=16, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    config, base = LadderConfig(task_type="CAUSAL_LM", r=2), BACKBONES["llama"].build()
    if checkpointing:
        base.gradient_checkpointing_enable()
    trainer = AdapterTrainer(base, settings, train_dataset=rows, peft_config=config)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(rows)["eval_loss"]
    assert after < 0.5 * before
    trainer.save_model()
    assert "Ladder side-tuning" in (tmp_path / "README.md").read_text()
    loaded = load_adapter(BACKBONES["llama"].build(), tmp_path).eval()
    inputs = BACKBONES["llama"].inputs()
    with torch.no_grad():
        assert torch.equal(output(loaded, inputs), output(trainer.model.eval(), inputs))
        kept = load_adapter(BACKBONES["llama"].build(), tmp_path / "checkpoint-30").eval()
        assert torch.equal(output(kept, inputs), output(loaded, inputs))


@pytest.mark.slow
def test_compile():
    """torch.compile, with as many graph breaks as it likes, changes no logit."""
    model, inputs = laddered("llama")
    with torch.no_grad():
        expected = output(model, inputs)
        found = output(torch.compile(model, backend="eager"), inputs)
    torch.testing.assert_close(found, expected)
