"""T-Few on two processes (gloo, started by torchrun): losses, gradients and scores are those of one process with the
joined batch, though each process has other numbers of tokens and choices.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from .test_tfew_trainer import ROWS, TERMS, Lazy, made

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")]

BACKBONES = ("llama", "t5")
KINDS = {
    "token": {},
    "example": {"average": "example", "choice_weight": 0.5, "epsilon": 0.01},
    "accumulated": {"gradient_accumulation_steps": 2},
    "answers": {"choice_weight": 0.0, "unlikelihood_weight": 0.0},
}


def run(folder, backbone, kind, examples, **kwargs):
    """Three steps of eight examples over all processes, by SGD, whose steps are the gradients; and what came of it.

    Args:
        examples: of one process, in a step.
    """
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "warmup_steps": 0, **KINDS[kind]}
    size = examples // options.get("gradient_accumulation_steps", 1)
    trainer = made(
        folder, backbone, rows=Lazy(), eval_dataset=ROWS, max_steps=3, max_grad_norm=0.0,
        per_device_train_batch_size=size, per_device_eval_batch_size=examples, save_strategy="steps", save_steps=3,
        **options, **kwargs,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    odd = trainer.evaluate(ROWS[:7])
    filled = trainer.evaluate([*ROWS[:7], ROWS[0]])  # to what two processes with four rows each fill seven up
    predicted = trainer.predict(ROWS)
    names = ("loss", *TERMS, "grad_norm")
    curves = {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}
    measured = {name: metrics[f"eval_{name}"] for name in ("loss", "accuracy", *TERMS) if f"eval_{name}" in metrics}
    measured |= {"odd_loss": (odd if trainer.args.world_size > 1 else filled)["eval_loss"]}
    measured |= {"odd_accuracy": odd["eval_accuracy"]}
    return {**curves, "eval": measured, "scores": np.exp(predicted.predictions).tolist()}


def rank(folder):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    for backbone in BACKBONES:
        for kind in KINDS:
            found = run(folder / f"{backbone}_{kind}", backbone, kind, 4, ddp_backend="gloo")
            (folder / f"{backbone}_{kind}_{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # on the way out DDP's reducer and gloo's thread can wait for each other, for ever


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29527"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.test_tfew_processes", str(folder)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1], timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_two_processes_equal_one(backbone, kind, two, tmp_path):
    one = run(tmp_path, backbone, kind, 8)
    first, second = (json.loads((two / f"{backbone}_{kind}_{i}.json").read_text()) for i in (0, 1))
    assert first == second
    assert len(one["loss"]) == 3
    for name in ("loss", *TERMS, "grad_norm"):
        assert first[name] == pytest.approx(one[name], rel=1e-4), name
    assert first["eval"] == pytest.approx(one["eval"], rel=1e-4)
    np.testing.assert_allclose(first["scores"], one["scores"], rtol=1e-4, atol=1e-6)
    weights = "checkpoint-3/adapter_model.safetensors"
    stored, expected = load_file(two / f"{backbone}_{kind}" / weights), load_file(tmp_path / weights)
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-4, atol=1e-6, msg=name)


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
