"""Trainers in processes of their own: killed while they train and save, and two of them at work on one batch.

A run that was killed and resumed, again and again, has the losses and weights of one that was left alone, to the bit.
Two processes (gloo, started by torchrun) have the losses of one process with the joined batch.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.hub_cards import TrainingRecord
from hf_peft_ext.trainers import AdapterTrainer, checkpoint, restore

from .tiny_trainers import TermsTrainer, losses, trainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")]

STEPS, EVERY = 16, 3


def run(folder, **kwargs):
    """Train, from the last complete checkpoint if there is one."""
    made = trainer(folder, max_steps=STEPS, save_steps=EVERY, logging_steps=2, save_total_limit=2, **kwargs)
    made.train(resume_from_checkpoint=restore.last_checkpoint(folder) is not None)
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes: a sum in another order differs in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    """A run that nobody disturbs: its losses, and the weights at the end."""
    made = run(tmp_path_factory.mktemp("whole"))
    return losses(made), load_file(Path(made.args.output_dir) / f"checkpoint-{STEPS}" / SAFETENSORS_WEIGHTS_NAME)


def same_as(whole, folder):
    state = json.loads((Path(folder) / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert {e["step"]: e["loss"] for e in state["log_history"] if "loss" in e} == whole[0]
    found = load_file(Path(folder) / f"checkpoint-{STEPS}" / SAFETENSORS_WEIGHTS_NAME)
    assert found.keys() == whole[1].keys()
    assert all(torch.equal(value, whole[1][name]) for name, value in found.items())


def process(function, *args):
    """A process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = context.Process(target=function, args=args)
    started.start()
    return started


# killed


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def die_in(owner, name, call, before=None):
    """Have the `call`th call of a function do half of its work, if there is a half, and kill the process."""
    stock, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            if before:
                before(stock, *args, **kwargs)
            die()
        return stock(*args, **kwargs)

    setattr(owner, name, dying)


def half_a_file(save, content, file, *args, **kwargs):
    save(content, file, *args, **kwargs)
    os.truncate(file, os.path.getsize(file) // 2)


def all_of_it(stock, *args, **kwargs):
    stock(*args, **kwargs)


def half_a_folder(remove, folder, *args, **kwargs):
    for file in sorted(Path(folder).iterdir())[::2]:
        file.unlink()


# where to die, in the save at step 9: name -> what is made to kill the process
POINTS = {
    "between saves": lambda: None,
    "in the weights": lambda: die_in(checkpoint.PeftModel, "save_pretrained", 3, all_of_it),
    "in the optimizer": lambda: die_in(torch, "save", 7, half_a_file),  # optimizer, scheduler, random state: 3 a save
    "in the list of files": lambda: die_in(checkpoint.AdapterCheckpoints, "_complete", 3),
    "before the name": lambda: die_in(Path, "rename", 3),
    "after the name": lambda: die_in(checkpoint, "rotate_checkpoints", 3),
    "in an old checkpoint's end": lambda: die_in(shutil, "rmtree", 7, half_a_folder),
}


def killed(folder, point):
    torch.set_num_threads(1)
    POINTS[point]()
    run(folder, callbacks=[DieAt(8)] if point == "between saves" else None)


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed(point, whole, tmp_path):
    """Killed between and in the middle of saves, a run goes on from the last complete checkpoint, to the bit."""
    child = process(killed, tmp_path, point)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    late = point in ("between saves", "after the name", "in an old checkpoint's end")
    assert (tmp_path / checkpoint.UNFINISHED / "checkpoint-9").exists() != late  # what was half written is there
    last = restore.last_checkpoint(tmp_path)
    assert last == get_last_checkpoint(tmp_path)  # transformers' own function does not meet a half one either
    assert Path(last).name == ("checkpoint-9" if late and point != "between saves" else "checkpoint-6")
    made = run(tmp_path)
    assert losses(made) == whole[0]
    same_as(whole, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the two checkpoints that are kept: nothing half is left


def run_quietly(folder):
    torch.set_num_threads(1)
    run(folder)


def test_killed_again_and_again(whole, tmp_path):
    """Killed at random moments until it gets through, a run ends as one that was left alone."""
    moments = random.Random(0)
    for kill in range(40):
        child = process(run_quietly, tmp_path)
        child.join(timeout=moments.uniform(0.05, 0.15) * 1.15**kill)  # at first too short for any machine
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
    assert child.exitcode == 0
    assert kill >= 1
    same_as(whole, tmp_path)


def test_benchmark(tmp_path):
    """examples/benchmarks/resume.py kills its run and finds no difference."""
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "resume.py"
    command = [sys.executable, str(script), "--steps", "12", "--save_steps", "3"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert "largest difference of a loss: 0; of a weight: 0" in done.stdout
    assert (tmp_path / "results" / "resume.png").exists()


# two processes


def unipelt():
    return UniPELTConfig(bottleneck_size=8, num_virtual_tokens=4, task_type="SEQ_CLS")


def joined(folder, batch, cls=TermsTrainer, **kwargs):
    """A trainer whose batches, over all processes, are of 16; no dropout, which each process would draw for itself."""
    from .test_training import classifier

    model = classifier()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    kwargs |= {"save_steps": 6, "eval_strategy": "steps", "eval_steps": 8, "per_device_eval_batch_size": batch}
    return trainer(folder, unipelt(), cls, model, per_device_train_batch_size=batch, **kwargs)


def rank(folder):
    """What each of the two processes does: a run, and one that goes on from its checkpoint."""
    torch.set_num_threads(1)
    made = joined(folder / "whole", 8, ddp_backend="gloo")
    made.train()
    made.save_model(str(folder / "saved"))
    if made.is_world_process_zero():
        shutil.copytree(folder / "whole" / "checkpoint-6", folder / "resumed" / "checkpoint-6")
    made.accelerator.wait_for_everyone()
    resumed = joined(folder / "resumed", 8, ddp_backend="gloo")
    resumed.train(resume_from_checkpoint=True)
    plain = joined(folder / "plain", 8, AdapterTrainer, ddp_backend="gloo")
    plain.train()
    history = {"whole": made.state.log_history, "resumed": resumed.state.log_history, "plain": plain.state.log_history}
    (folder / f"{made.args.process_index}.json").write_text(json.dumps(history))
    resumed.accelerator.wait_for_everyone()
    os._exit(0)  # on the way out DDP's reducer and gloo's thread can wait for each other, for ever


def curve(history, name):
    return [entry[name] for entry in history if name in entry]


def test_two_processes_equal_one(tmp_path):
    """Losses, terms, metrics and gates of two processes are those of one with the joined batch; one of them saves."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29521"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.test_trainers_processes", str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1], timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1))
    one = joined(tmp_path / "one", 16)
    one.train()
    names = ["loss", "class_loss", "logit_loss", "eval_loss", "eval_class_loss", "eval_accuracy"]
    for name in [*names, "gates/1.attention_prefix"]:
        expected = curve(one.state.log_history, name)
        assert expected, name
        assert curve(first["whole"], name) == curve(second["whole"], name)
        assert curve(first["whole"], name) == pytest.approx(expected, abs=2e-4 if "gates" in name else 1e-5), name
        assert curve(first["resumed"], name) == curve(first["whole"], name), name
    alone = joined(tmp_path / "alone", 16, AdapterTrainer)
    alone.train()
    for name in ("loss", "grad_norm", "eval_loss"):
        expected = pytest.approx(curve(alone.state.log_history, name), rel=1e-3)
        assert curve(first["plain"], name) == curve(second["plain"], name) == expected, name
    saved = {file.name for file in (tmp_path / "saved").iterdir()}
    assert saved >= {"adapter_config.json", "adapter_model.safetensors", "training_record.json", "README.md"}
    stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    expected = load_file(tmp_path / "one" / "checkpoint-16" / "adapter_model.safetensors")
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=2e-4, msg=name)
    states = {file.name for file in (tmp_path / "whole" / "checkpoint-6").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    assert TrainingRecord.load(tmp_path / "saved").hardware.startswith("2 x ")
    assert not (tmp_path / "whole" / "unfinished").exists()


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
