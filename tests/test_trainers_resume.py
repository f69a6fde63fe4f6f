"""A resumed run equals one without a break, bit for bit; checkpoints that do not fit are refused."""

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig

from hf_peft_ext import UniPELTConfig, load_backbone

from .backbones import BACKBONES, SPECIAL, VOCAB
from .test_training import StopAt, trained
from .tiny_trainers import config, logged, lora, losses, projected, trainer, two_adapters

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
RESUMED = {
    "in an epoch": (None, {"save_steps": 6, "logging_steps": 1}),
    "at its end": (None, {"save_steps": 8, "logging_steps": 4}),
    "between two logs": (None, {"save_steps": 6, "logging_steps": 4}),
    "accumulating": (None, {"save_steps": 5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}),
    "evaluating": (None, {"save_steps": 6, "eval_strategy": "steps", "eval_steps": 3}),
    "checkpointing gradients": (None, {"save_steps": 6, "activation_checkpointing": True}),
    "smoothing labels": (None, {"save_steps": 6, "label_smoothing_factor": 0.1}),
    "several adapters": (two_adapters, {"save_steps": 6}),
    "prefixes of a network": (projected, {"save_steps": 6}),
    "stock LoRA": (lora, {"save_steps": 6}),
}
FAST = ("between two logs", "several adapters", "prefixes of a network")


@pytest.mark.parametrize(
    "case", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
def test_resumed_training_equals_uninterrupted(case, tmp_path):
    """A run that is stopped and resumed in a new model repeats later losses and weights bit for bit."""
    build, kwargs = RESUMED[case]
    build = build or (lambda: None)
    whole = trainer(tmp_path / "whole", model=build(), **kwargs)
    whole.train()
    step = kwargs["save_steps"]
    half = trainer(tmp_path / "half", model=build(), callbacks=[StopAt(step)], **kwargs)
    half.train()
    resumed = trainer(tmp_path / "half", model=build(), **kwargs)
    torch.rand(7)  # whatever else a process has done with its random numbers
    result = resumed.train(resume_from_checkpoint=True)
    assert result.global_step == 16
    assert losses(resumed) == losses(whole)
    assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    for name, value in trained(whole.model).items():
        assert torch.equal(trained(resumed.model)[name], value), name
    assert any(not torch.equal(value, trained(half.model)[name]) for name, value in trained(whole.model).items())


def test_what_is_not_complete_is_not_resumed(tmp_path):
    """A checkpoint with a file missing or cut short is refused by name, and passed over for the one before."""
    made = trainer(tmp_path, max_steps=9, save_steps=3)
    made.train()
    weights = tmp_path / "checkpoint-9" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-9'\) is not a complete checkpoint: adapter_model.safetensors miss"
    ):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    resumed = trainer(tmp_path, callbacks=[StopAt(4)])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    with pytest.raises(ValueError, match=r"`output_dir` \(=.*\) holds no complete checkpoint to resume"):
        trainer(tmp_path / "none").train(resume_from_checkpoint=True)


def test_another_adapters_checkpoint_is_refused(tmp_path):
    """A checkpoint that does not fit the adapter raises an error, and the model is unchanged."""
    trainer(tmp_path, max_steps=3, save_steps=3).train()
    other = trainer(tmp_path, UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, task_type="SEQ_CLS"))
    before = trained(other.model)
    with pytest.raises(ValueError, match=r"must hold the model's adapter 'default', but \d+ weights are missing"):
        other.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, before[name]) for name, value in trained(other.model).items())
    network = trainer(tmp_path, model=projected())
    (tmp_path / "plain").mkdir()
    network.model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "trainer_state.json").write_text("{}")
    refused = pytest.raises(
        ValueError, match=r"must hold trained_weights\.safetensors, since the adapter's file lacks"
    )
    with refused, pytest.warns(UserWarning, match="holds no state of the optimizer: training goes on with a new one"):
        network.train(resume_from_checkpoint=str(tmp_path / "plain"))


def test_a_checkpoint_of_an_earlier_run_is_replaced(tmp_path):
    """A second run in the same folder writes its checkpoints over the first one's."""
    trainer(tmp_path, max_steps=3, save_steps=3, seed=1).train()
    again = trainer(tmp_path, max_steps=3, save_steps=3, seed=2)
    again.train()
    stored = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(again.model)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3"]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(bits, tmp_path):
    """A quantized base model is resumed exactly, evaluated in between, and named in the record."""
    pytest.importorskip("bitsandbytes")
    tiny = {**BACKBONES["bert"].config, "hidden_size": 64, "intermediate_size": 128}
    tiny = BertConfig(vocab_size=VOCAB, num_labels=2, **SPECIAL, **tiny)
    torch.manual_seed(0)
    BertForSequenceClassification(tiny).save_pretrained(tmp_path / "base")

    def quantized(folder, **kwargs):
        model = load_backbone(tmp_path / "base", bits, task_type="SEQ_CLS")
        kwargs |= {"save_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
        return trainer(tmp_path / folder, config(), model=model, **kwargs)

    whole = quantized("whole")
    whole.train()
    quantized("half", callbacks=[StopAt(6)]).train()
    resumed = quantized("half")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole).values())) == 4
    for name, value in trained(whole.model).items():
        assert torch.equal(trained(resumed.model)[name], value), name
    assert whole.filled_record().quantization == {4: "4-bit NF4, double quantisation", 8: "8-bit"}[bits]
    assert whole.filled_record().base_model == "./base"  # no folders of this machine


def test_own_quantization(tmp_path):
    """A base model loaded by a `BitsAndBytesConfig` of one's own is prepared for training, and resumed exactly."""
    pytest.importorskip("bitsandbytes")
    tiny = {**BACKBONES["bert"].config, "hidden_size": 64, "intermediate_size": 128}
    tiny = BertConfig(vocab_size=VOCAB, num_labels=2, **SPECIAL, **tiny)
    torch.manual_seed(0)
    BertForSequenceClassification(tiny).save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["classifier"],
    )

    def quantised(folder, **kwargs):
        place = {"quantization_config": four, "device_map": {"": "cpu"}}
        model = BertForSequenceClassification.from_pretrained(tmp_path / "base", **place)
        kwargs |= {"save_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
        return trainer(tmp_path / folder, config(), model=model, **kwargs)

    whole = quantised("whole")
    whole.train()
    quantised("half", callbacks=[StopAt(6)]).train()
    resumed = quantised("half")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole).values())) == 4
