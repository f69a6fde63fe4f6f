"""Trainers for adapters: against transformers' own, on tiny models on the CPU; evaluation, sequence to sequence, TRL.

Resuming, the record, losses, runs that are killed, two processes and pushes: test_trainers_*.py.
"""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.hub_cards import Result, TrainingRecord
from hf_peft_ext.trainers import AdapterSeq2SeqTrainer, AdapterTrainer

from .backbones import BACKBONES
from .test_training import StopAt, arguments, classifier, separable, tokenizer, trained
from .tiny_trainers import accuracy, config, logged, losses, projected, trainer, two_adapters

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


# the adapter


def test_trains_as_transformers_trainer_does(tmp_path):
    """Losses and weights are those of transformers' Trainer, though gates are looked at and a record is kept."""
    ours = trainer(tmp_path / "ours", eval_strategy="steps", eval_steps=5)
    ours.train()
    base = classifier()
    torch.manual_seed(3)
    model = get_peft_model(base, config())
    args = arguments(tmp_path / "theirs", eval_strategy="steps", eval_steps=5)
    theirs = Trainer(model, args, train_dataset=separable(), eval_dataset=separable(16), compute_metrics=accuracy)
    theirs.train()
    assert losses(ours) == losses(theirs)
    assert logged(ours, "eval_loss") == logged(theirs, "eval_loss")
    for name, value in trained(model).items():
        assert torch.equal(trained(ours.model)[name], value), name


def test_model_init_and_search(tmp_path):
    """`model_init` starts each training from a new base model and a new adapter; the search is Trainer's own."""
    args = arguments(tmp_path, max_steps=2, save_strategy="no")
    made = AdapterTrainer(model_init=classifier, args=args, train_dataset=separable(), peft_config=config())
    models = [(made.train(), made.model)[1] for _ in range(2)]
    first, second = ({name: p.detach().clone() for name, p in trained(model).items()} for model in models)
    assert models[0] is not models[1]
    assert first.keys() == second.keys()
    assert any("sublayer_of" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)  # the same seed, from the start
    assert AdapterTrainer.hyperparameter_search is Trainer.hyperparameter_search


def test_refuses_what_has_no_adapter_or_two(tmp_path):
    """A base model alone, and an adapter with another config, are errors that say what to do."""
    args = arguments(tmp_path)
    with pytest.raises(
        TypeError, match=r"`model` \(=BertForSequenceClassification\) must be a PeftModel, or `peft_conf"
    ):
        AdapterTrainer(classifier(), args)
    with pytest.raises(TypeError, match=r"`peft_config` \(=dict\) must be a PeftConfig"):
        AdapterTrainer(classifier(), args, peft_config={"peft_type": "UNIPELT"})
    with pytest.raises(ValueError, match="`peft_config` must be None where `model` has an adapter already"):
        AdapterTrainer(get_peft_model(classifier(), config()), args, peft_config=config())


def test_trl_is_needed_for_its_trainer_only(monkeypatch):
    """Without TRL the trainers import, and AdapterSFTTrainer says which extra to install."""
    for name in [name for name in sys.modules if name.startswith(("hf_peft_ext.trainers", "trl."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    trainers = importlib.import_module("hf_peft_ext.trainers")
    assert trainers.AdapterTrainer is not AdapterTrainer
    with pytest.raises(ImportError, match=r"AdapterSFTTrainer needs TRL: pip install 'hf_peft_ext\[trl\]'"):
        _ = trainers.AdapterSFTTrainer
    with pytest.raises(AttributeError, match="has no attribute 'AdapterTrainr'"):
        _ = trainers.AdapterTrainr


# what is saved


def test_saves_the_adapter_and_no_secret(tmp_path, monkeypatch):
    """No base weights and no pickled arguments, neither in a checkpoint nor at the end; the token is in no file."""
    token = "hf_" + "Canary" * 6
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--lr", "1", "--hub_token", token, f"--hub-token={token}"])
    made = trainer(tmp_path, max_steps=4, save_steps=4, hub_token=token)
    made.train()
    made.save_model()
    checkpoint = {file.name for file in (tmp_path / "checkpoint-4").iterdir()}
    assert checkpoint >= {"adapter_model.safetensors", "adapter_config.json", "training_args.json", "optimizer.pt"}
    assert not any((tmp_path / "unfinished").parent.glob("unfinished"))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not {"training_args.bin", "model.safetensors", "pytorch_model.bin"} & {file.name for file in files}
    for file in files:
        assert token.encode() not in file.read_bytes(), file
    stored = json.loads((tmp_path / "training_args.json").read_text())
    assert stored["learning_rate"] == 5e-3
    assert "hub_token" not in stored
    assert TrainingRecord.load(tmp_path).command == "train.py --lr 1"
    adapter = get_peft_model_state_dict(made.model).keys()
    assert not any("sublayer_of" not in name and "classifier" not in name for name in adapter)
    for file in tmp_path.rglob("*.safetensors"):
        assert load_file(file).keys() == adapter, file


# evaluation and stopping early


class WorseAndWorse(TrainerCallback):
    """Spoils the adapter after some steps, so that the best one came before."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 6:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize(
    "build",
    [None, pytest.param(two_adapters, marks=pytest.mark.slow), pytest.param(projected, marks=pytest.mark.slow)],
)
def test_early_stopping_restores_the_best_adapter(build, tmp_path):
    """Training ends when the loss gets worse; the best adapter is loaded, and the record tells of that one."""
    made = trainer(
        tmp_path, model=build and build(), callbacks=[WorseAndWorse(), EarlyStoppingCallback(2)],
        max_steps=30, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", save_total_limit=2,
    )  # fmt: skip
    made.train()
    assert made.state.global_step < 30
    best = made.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{made.state.best_global_step}")
    assert made.state.best_global_step <= 6
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    found = {r.metric: r.value for r in made.filled_record().results}
    assert made.evaluate()["eval_loss"] == made.state.best_metric == found["loss"]


def test_base_and_other_runs(tmp_path):
    """The base model is measured without the adapter, which stays; other runs are recorded with their spread."""
    made = trainer(tmp_path, max_steps=30)
    made.train()
    metrics, before = made.evaluate(), trained(made.model)
    base = made.evaluate_base()
    assert base["base_eval_loss"] != metrics["eval_loss"]
    assert made.evaluate()["eval_loss"] == metrics["eval_loss"]
    assert all(torch.equal(value, before[name]) for name, value in trained(made.model).items())
    plain = Trainer(classifier(), arguments(tmp_path), eval_dataset=separable(16)).evaluate()
    assert base["base_eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)
    made.record_results({"accuracy": [0.5, 0.7]}, method="lora")
    made.record_results(TrainingRecord(results=[Result("f1", 0.6), Result("f1", 0.1, method="base")]), method="full")
    found = {(r.metric, r.method): r for r in made.filled_record().results}
    assert found["loss", "adapter"].value == metrics["eval_loss"]
    assert found["loss", "base"].value == base["base_eval_loss"]
    lora = found["accuracy", "lora"]
    assert (lora.value, lora.runs) == (pytest.approx(0.6), 2)
    assert (lora.dataset, lora.split) == ("eval", "evaluation")  # where accuracy was measured here
    assert lora.spread == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert found["f1", "full"].value == 0.6
    with pytest.raises(ValueError, match=r"`results` \(=\{'f1': \[\]\}\) must have a value for each metric"):
        made.record_results({"f1": []})


def test_results_of_older_weights_are_not_recorded(tmp_path):
    """What was measured before the last step is in the history and not among the results."""
    made = trainer(tmp_path, callbacks=[StopAt(5)], eval_strategy="steps", eval_steps=4)
    made.train()
    record = made.filled_record()
    assert not record.results
    assert [entry["step"] for entry in record.history if "eval_loss" in entry] == [4]
    made.predict(separable(8))
    assert {(r.metric, r.split) for r in made.filled_record().results} == {("loss", "test"), ("accuracy", "test")}


def test_what_the_hub_would_refuse_is_refused_first(tmp_path):
    """A licence, a language or a task that is none of the Hub's ends no training and leaves no half of an adapter."""
    made = trainer(tmp_path, max_steps=2)
    made.record.license = "Apache 2.0"
    with pytest.raises(ValueError, match=r"`license` \(='Apache 2.0'\) must be .* did you mean 'apache-2.0'"):
        made.train()
    assert made.state.global_step == 0
    made.record.license = None
    made.train()
    made.record.language = ["english"]
    with pytest.raises(ValueError, match=r"`language` \(='english'\) must be an ISO 639 code"):
        made.save_model()
    made.record.language, made.record.pipeline_tag = ["en"], "classifying"
    with pytest.raises(ValueError, match=r"`pipeline_tag` \(='classifying'\) must be a task of the Hub"):
        made.save_model()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


# sequence to sequence, and supervised fine-tuning


def test_seq2seq_generates(tmp_path):
    """Evaluation by generation works, and its metrics are recorded."""
    model = BACKBONES["t5"].build()
    rows = [{"input_ids": [5 + i, 7, 2], "labels": [5 + i, 2]} for i in range(8)]
    args = {"predict_with_generate": True, "generation_max_length": 6, "generation_num_beams": 2, "max_steps": 4}
    args |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2}
    made = AdapterSeq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(str(tmp_path), **args),
        data_collator=DataCollatorForSeq2Seq(tokenizer(), model=model),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer(),
        compute_metrics=lambda p: {"length": float(p.predictions.shape[1])},
        peft_config=UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM"),
    )
    made.train()
    assert (made.predict(rows).predictions != -100).any(1).all()
    assert {r.metric for r in made.filled_record().results} == {"length", "loss"}
    made.save_model()
    assert (tmp_path / "tokenizer.json").exists()


# 2026-11: TRL's own default for an argument that transformers renames
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_sft(tmp_path):
    """TRL's trainer with our mixin: trained, resumed exactly, recorded; the adapter alone is saved."""
    trl = pytest.importorskip("trl")
    from hf_peft_ext.trainers import AdapterSFTTrainer

    data = Dataset.from_dict({"text": [" ".join(f"w{(i + j) % 7}" for j in range(5 + i % 6)) for i in range(32)]})

    def sft(folder, packing=False, **kwargs):
        args = trl.SFTConfig(
            **{"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False},
            **{"per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_steps": 8, "logging_steps": 2},
            **{"max_length": 32, "save_steps": 3, "packing": packing, "packing_strategy": "wrapped"},
        )
        peft_config = UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, task_type="CAUSAL_LM")
        given = {"train_dataset": data, "processing_class": tokenizer(), "peft_config": peft_config}
        return AdapterSFTTrainer(model=BACKBONES["llama"].build(), args=args, **given, **kwargs)

    whole = sft(tmp_path / "whole")
    whole.train()
    sft(tmp_path / "half", callbacks=[StopAt(3)]).train()
    resumed = sft(tmp_path / "half")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert not list(tmp_path.rglob("training_args.bin"))
    whole.save_model()
    record = TrainingRecord.load(tmp_path / "whole")
    assert record.trainer == "SFT"
    assert record.hyperparameters == {
        **{"use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_steps": 8},
        **{"logging_steps": 2, "max_length": 32, "save_steps": 3, "packing_strategy": "wrapped"},
        **{"gradient_checkpointing": True},  # TRL's own default
    }
    assert record.datasets[0].fingerprint == data._fingerprint
    assert "mean_token_accuracy" in record.history[0]
    held_out = data.select(range(8))
    packed = sft(tmp_path / "packed", packing=True, eval_dataset=held_out)
    other = {"other": data.select(range(8, 18))}
    metrics = {**packed.evaluate(), **packed.evaluate(other)}
    packed.evaluate(held_out)
    packed.get_train_dataloader()
    assert len(packed.eval_dataset) < 8
    seen = [(d.name, d.rows, d.used_for) for d in packed.record.datasets]
    assert seen == [("eval", 8, "eval"), ("other", 10, "eval"), ("train", 32, "train")]
    found = {(r.metric, r.dataset): r.value for r in packed.filled_record().results}
    assert found == {("loss", "eval"): metrics["eval_loss"], ("loss", "other"): metrics["eval_other_loss"]}
