"""Trainers for adapters: against transformers' own, and a resumed run against one without a break, bit for bit.

Tiny models on the CPU. Runs that are killed, and two processes, are in test_trainers_processes.py; pushes are in
test_trainers_hub.py.
"""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_peft_ext import LayerPrefixConfig, UniPELTConfig
from hf_peft_ext.hub_cards import Result, TrainingRecord
from hf_peft_ext.trainers import AdapterSeq2SeqTrainer, AdapterTrainer, AdapterTrainerMixin
from hf_peft_ext.trainers.run_info import hyperparameters

from .backbones import BACKBONES, SPECIAL, VOCAB
from .test_training import StopAt, arguments, classifier, separable, tokenizer, trained

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


def config(**kwargs):
    return UniPELTConfig(bottleneck_size=8, num_virtual_tokens=4, lora_dropout=0.1, task_type="SEQ_CLS", **kwargs)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(folder, peft_config=None, cls=AdapterTrainer, model=None, callbacks=None, **kwargs):
    model = classifier() if model is None else model
    peft_config = peft_config or (None if hasattr(model, "peft_config") else config())
    given = {"train_dataset": separable(), "eval_dataset": separable(16), "compute_metrics": accuracy}
    return cls(model, arguments(folder, **kwargs), peft_config=peft_config, callbacks=callbacks, **given)


def losses(trainer):
    return {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


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


# resuming


def two_adapters():
    """The adapter that is trained has a name of its own, and another one lies beside it."""
    torch.manual_seed(3)
    model = get_peft_model(classifier(), config(), adapter_name="first")
    model.add_adapter("second", config(modules_to_save=["pooler"]))
    model.set_adapter("second")
    return model


def projected():
    torch.manual_seed(3)
    wide = {"num_virtual_tokens": 4, "encoder_hidden_size": 8, "task_type": "SEQ_CLS"}
    return get_peft_model(classifier(), LayerPrefixConfig(prefix_projection=True, **wide))


def lora():
    torch.manual_seed(3)
    return get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1))


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
    """Stopped and resumed in a new model, every later loss and every weight is the same, to the bit."""
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
    """A checkpoint that does not fit the adapter is an error, and the model stays as it was."""
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
    refused = pytest.raises(ValueError, match=r"must hold trained_weights\.safetensors, the network that computes")
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


def test_the_command_can_be_run_again(tmp_path):
    """A module that was started with `python -m` is recorded so, a script by its name."""
    says = "from hf_peft_ext.trainers.run_info import command_line\nprint(command_line())\n"
    (tmp_path / "said").mkdir()
    for name in ("said/__init__.py", "said/part.py", "said/__main__.py"):
        (tmp_path / name).write_text("" if name == "said/__init__.py" else says)
    for start in (["-m", "said.part"], ["-m", "said"], ["said/part.py"]):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}
        run = subprocess.run([sys.executable, *start, "--lr", "1"], cwd=tmp_path, env=env, capture_output=True)
        said = "part.py" if len(start) == 1 else f"python -m {start[1]}"
        assert run.stdout.decode().strip() == f"{said} --lr 1", run.stderr.decode()


# the record


def rows(count):
    return Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in separable(count)])


def places(trainer):
    return {(r.metric, r.dataset, r.split): r.value for r in trainer.filled_record().results}


def test_record(tmp_path):
    """What a card needs is recorded, as it is known elsewhere, and survives being saved."""
    made = trainer(tmp_path, max_steps=12, eval_strategy="steps", eval_steps=6, weight_decay=0.01)
    made.train_dataset = rows(64)
    made.train()
    made.save_model()
    record = TrainingRecord.load(tmp_path)
    assert record == made.filled_record()
    trainable, total = made.model.get_nb_trainable_parameters()
    assert (record.trainable_parameters, record.total_parameters) == (trainable, total)
    assert record.peak_memory > 1e7
    assert 0 < record.step_time < record.train_time
    assert record.seeds == [3]
    assert record.versions.keys() >= {"hf_peft_ext", "peft", "torch", "transformers", "python"}
    assert record.hyperparameters == {
        **{"use_cpu": True, "seed": 3, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "max_steps": 12},
        **{"logging_steps": 4, "save_steps": 8, "eval_strategy": "steps", "eval_steps": 6, "do_eval": True},
        **{"weight_decay": 0.01},
    }
    assert {r.metric for r in record.results} == {"loss", "accuracy"}
    train, evaluated = record.datasets
    assert (train.rows, train.fingerprint, train.used_for) == (64, made.train_dataset._fingerprint, "train")
    assert (evaluated.rows, evaluated.on_hub, evaluated.used_for) == (16, False, "eval")
    assert [entry["loss"] for entry in record.history if "loss" in entry] == list(losses(made).values())
    assert record.gates.keys() == {key[6:] for entry in made.state.log_history for key in entry if "gates/" in key}
    assert all(0 < gate < 1 for gate in record.gates.values())
    assert record.quantization is None
    assert (tmp_path / "README.md").exists()


def test_a_resumed_run_keeps_its_record(tmp_path):
    """What was said and measured before a break is in the record after it, though no step is left to train."""
    first = trainer(tmp_path, max_steps=4, save_steps=4)
    first.record.tags = ["mine"]
    first.train()
    first.evaluate()
    first.evaluate_base()
    first.record_results({"accuracy": 0.7}, method="lora")
    first.record.language, first.record.license = ["en"], "mit"
    first.save_model()
    before, stored = TrainingRecord.load(tmp_path), TrainingRecord.load(tmp_path / "checkpoint-4")
    again = trainer(tmp_path, max_steps=4, save_steps=4)
    again.record.license = "apache-2.0"
    again.train(resume_from_checkpoint=True)
    assert again.filled_record().gates == stored.gates != {}
    again.evaluate()
    again.save_model()
    after = TrainingRecord.load(tmp_path)
    assert (after.language, after.license, after.tags) == (["en"], "apache-2.0", ["mine"])
    assert after.results == before.results
    assert {r.method for r in after.results} == {"adapter", "base", "lora"}
    assert (after.step_time, after.train_time) == (stored.step_time, stored.train_time)
    assert after.step_time > 0
    assert after.peak_memory > 1e7
    other = trainer(tmp_path, max_steps=4)  # a new run in the same folder begins a new record
    other.train()
    assert (other.filled_record().license, other.filled_record().results) == (None, [])


def test_settings_without_defaults(tmp_path, monkeypatch):
    """A class whose settings must be given is compared field by field; devices and DeepSpeed are left alone."""

    @dataclass
    class Needy(TrainingArguments):
        margin: float = field(kw_only=True)

    args = Needy(output_dir=str(tmp_path), use_cpu=True, margin=0.5, max_steps=4)
    assert {"use_cpu": True, "margin": 0.5, "max_steps": 4}.items() <= hyperparameters(args).items()
    usual = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=4)
    state = dict(vars(PartialState()))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as its launcher does
    assert hyperparameters(usual) == {"use_cpu": True, "max_steps": 4}
    assert vars(PartialState()) == state


def test_each_evaluated_set_has_its_results(tmp_path):
    """Sets of one trainer go by their names, however they are evaluated; others without a name are numbered."""
    made = trainer(tmp_path)
    sets = {"easy": rows(16), "hard": rows(24)}
    made.eval_dataset = sets
    easy = made.evaluate(sets["easy"])["eval_loss"]
    hard = made.evaluate("hard")["eval_loss"]
    found = places(made)
    assert easy != hard
    assert (found["loss", "easy", "evaluation"], found["loss", "hard", "evaluation"]) == (easy, hard)
    assert places(made).keys() == ((made.evaluate(), places(made))[1]).keys()
    small, large = (made.evaluate(rows(count))["eval_loss"] for count in (8, 12))
    made.evaluate(rows(8))
    found = {name: value for (metric, name, _), value in places(made).items() if metric == "loss"}
    assert found == {"easy": easy, "hard": hard, "eval": small, "eval 2": large}
    made.evaluate_base("hard")
    assert [(d.name, d.rows) for d in made.record.datasets] == [
        ("easy", 16),
        ("hard", 24),
        ("eval", 8),
        ("eval 2", 12),
    ]
    assert {d.used_for for d in made.record.datasets} == {"eval"}
    assert {r.dataset for r in made.record.results if r.method == "base"} == {"hard"}


def test_gates_are_logged(tmp_path):
    """Without evaluation the gates of the last training batch are logged; for methods without gates nothing is."""
    made = trainer(tmp_path, max_steps=8, logging_steps=4)
    made.train()
    steps = [entry["step"] for entry in made.state.log_history if "gates/0.query_low_rank" in entry]
    assert steps == [4, 8]
    plain = trainer(tmp_path, model=lora(), max_steps=8, logging_steps=4)
    plain.train()
    assert not any("gates" in key for entry in plain.state.log_history for key in entry)


def test_hub_datasets_are_known(tmp_path, monkeypatch):
    """Id and revision of data from the Hub are read from where `datasets` keeps them, spelt as on the Hub."""
    from hf_peft_ext.trainers import run_info as facts

    revision = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "acme___support_msgs" / "default" / "0.0.0" / revision
    Dataset.from_dict({"a": [1, 2]}).save_to_disk(place)
    data = Dataset.from_file(str(next(place.glob("*.arrow"))), split="train")
    monkeypatch.setattr(facts, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = facts.dataset_record(data, "train")
    assert (found.on_hub, found.revision, found.rows, found.split) == (False, revision, 2, "train")
    (tmp_path / "hub" / "datasets--acme--SupportMsgs" / "snapshots" / revision).mkdir(parents=True)
    found = facts.dataset_record(data, "train")
    assert (found.name, found.on_hub, found.revision) == ("acme/SupportMsgs", True, revision)
    assert facts.dataset_record(None) is None


def test_records_of_several_runs_are_merged():
    """Mean and spread over runs are numpy's, whether single runs or means of runs are merged."""
    values = [0.5, 0.6, 0.8, 0.9]
    runs = [TrainingRecord(base_model="b", results=[Result("f1", v)], seeds=[i]) for i, v in enumerate(values)]
    merged = TrainingRecord.merge(runs)
    assert (merged.seeds, merged.results[0].runs) == ([0, 1, 2, 3], 4)
    assert merged.results[0].value == pytest.approx(np.mean(values))
    assert merged.results[0].spread == pytest.approx(np.std(values, ddof=1))
    again = TrainingRecord.merge([TrainingRecord.merge(runs[:3]), runs[3]])
    assert again.results[0].value == pytest.approx(np.mean(values))
    assert again.results[0].spread == pytest.approx(np.std(values, ddof=1))
    with pytest.raises(ValueError, match=r"`base_model` \(=\['None', 'b'\]\) must be the same in all records"):
        TrainingRecord.merge([runs[0], TrainingRecord()])
    with pytest.raises(ValueError, match=r"`records` .* must hold at least one record"):
        TrainingRecord.merge([])


def test_four_bits(tmp_path):
    """A 4-bit base model is prepared for training, resumed exactly, evaluated in between, and named in the record."""
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
    assert whole.filled_record().quantization == "4-bit NF4, double quantisation"
    assert whole.filled_record().base_model == "./base"  # no folders of this machine


def test_a_second_training_starts_its_sums_anew(tmp_path):
    """Terms of a first training are in no log of a second one with the same trainer."""
    made = trainer(tmp_path, cls=TermsTrainer, max_steps=6, save_strategy="no")
    made.train()
    made.train()
    for entry in made.state.log_history:
        if "loss" in entry:
            assert entry["class_loss"] + entry["logit_loss"] == pytest.approx(entry["loss"], abs=1e-6)


class MeanLossTrainer(AdapterTrainer):
    """Returns the mean over the batch at hand, whatever the model; it draws random numbers of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        torch.rand(1)
        self.add_loss_terms(class_loss=outputs.loss)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.mark.parametrize(
    ("backbone", "cls"),
    [("bert", AdapterTrainer), ("llama", AdapterTrainer), ("bert", MeanLossTrainer), ("llama", MeanLossTrainer)],
)
def test_accumulated_batches_equal_one_batch(backbone, cls, tmp_path):
    """Four small batches train as one large batch, whether the loss is a mean or takes Trainer's count."""

    def made(folder, batch, accumulated):
        model = classifier() if backbone == "bert" else BACKBONES["llama"].build()
        for module in model.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        rows = separable()
        if backbone == "llama":
            rows = [{**row, "labels": row["input_ids"]} for row in rows]
        args = arguments(tmp_path / folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated)
        adapter = UniPELTConfig(bottleneck_size=8, num_virtual_tokens=4)
        return cls(model, args, train_dataset=rows, peft_config=adapter)

    one, four = made("one", 16, 1), made("four", 4, 4)
    one.train()
    four.train()
    assert list(losses(four).values()) == pytest.approx(list(losses(one).values()), abs=1e-4)
    assert logged(four, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-2)
    assert four.model_accepts_loss_kwargs == (backbone == "llama" and cls is AdapterTrainer)
    if cls is MeanLossTrainer:
        assert logged(four, "class_loss") == pytest.approx(list(losses(four).values()), abs=1e-6)


def test_asking_for_the_loss_leaves_no_trace(tmp_path):
    """With an own loss that accumulates, training is Trainer's with the scale declared: to the bit, with dropout."""
    accumulating = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 4}
    asked = trainer(tmp_path, cls=MeanLossTrainer, **accumulating)
    asked.train()
    told = trainer(tmp_path, cls=type("Told", (MeanLossTrainer,), {"loss_is_scaled_for_ga": False}), **accumulating)
    told.train()
    assert losses(asked) == losses(told)
    assert logged(asked, "class_loss") == logged(told, "class_loss")
    assert all(torch.equal(trained(asked.model)[name], value) for name, value in trained(told.model).items())


# loss terms and other people's trainers


class TheirTrainer(Trainer):
    """A trainer as somebody else would write it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class TermsTrainer(AdapterTrainerMixin, TheirTrainer):
    _name = "Terms"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        norm = outputs.logits.square().mean()
        self.add_loss_terms(class_loss=loss, logit_loss=0.1 * norm)
        loss = loss + 0.1 * norm
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("accumulated", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_loss_terms_add_up(accumulated, tmp_path):
    """Terms that add up to the loss in a batch do so in each log, in training and evaluation, also after a break."""
    kwargs = {"per_device_train_batch_size": 16 // accumulated, "gradient_accumulation_steps": accumulated}
    kwargs |= {"eval_strategy": "steps", "eval_steps": 6, "save_steps": 6, "per_device_eval_batch_size": 6}
    whole = trainer(tmp_path / "whole", cls=TermsTrainer, **kwargs)
    whole.train()
    for entry in whole.state.log_history:
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in entry:
                terms = entry[f"{prefix}class_loss"] + entry[f"{prefix}logit_loss"]
                assert terms == pytest.approx(entry[f"{prefix}loss"], abs=1e-6)
    assert len(logged(whole, "class_loss")) == 4
    trainer(tmp_path / "half", cls=TermsTrainer, callbacks=[StopAt(6)], **kwargs).train()
    resumed = trainer(tmp_path / "half", cls=TermsTrainer, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "class_loss") == logged(whole, "class_loss")
    record = resumed.filled_record()
    assert (record.trainer, "class_loss" in record.history[0]) == ("Terms", True)
    with pytest.raises(ValueError, match=r"`terms` \(='loss'\) must have names that Trainer does not log itself"):
        whole.add_loss_terms(loss=torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"`kl` \(=float\) must be a tensor"):
        whole.add_loss_terms(kl=0.5)
    with pytest.raises(ValueError, match=r"`kl` \(=\(2,\)\) must be a single number"):
        whole.add_loss_terms(kl=torch.ones(2))


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
