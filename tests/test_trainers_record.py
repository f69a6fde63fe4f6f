"""The training record: what the trainers note for the card, and how records are merged."""

import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainingArguments

from hf_peft_ext.hub_cards import Result, TrainingRecord
from hf_peft_ext.trainers.run_info import hyperparameters

from .test_training import separable
from .tiny_trainers import lora, losses, trainer

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


@pytest.mark.parametrize(
    "start",
    [["-m", "said.part"], *(pytest.param(s, marks=pytest.mark.slow) for s in (["-m", "said"], ["said/part.py"]))],
    ids=" ".join,
)
def test_the_command_can_be_run_again(start, tmp_path):
    """A module that was started with `python -m` is recorded so, a script by its name."""
    says = "from hf_peft_ext.trainers.run_info import command_line\nprint(command_line())\n"
    (tmp_path / "said").mkdir()
    for name in ("said/__init__.py", "said/part.py", "said/__main__.py"):
        (tmp_path / name).write_text("" if name == "said/__init__.py" else says)
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
    """Evaluation sets of a trainer keep their names in the record; unnamed sets from elsewhere are numbered."""
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
