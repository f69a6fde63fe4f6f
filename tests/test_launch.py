"""Training on two processes, by both launchers: one complete adapter, equal to what one process trains on all rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification

from hf_peft_ext import CompacterConfig, LadderConfig, MAMConfig, UniPELTConfig

from .backbones import BACKBONES, output
from .methods import randomise
from .test_training import tokenizer

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    BACKBONES["bert"].build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def launch(launcher, bert, out, *changes):
    """`hf-peft-ext train examples/recipes/unipelt.yaml` on a tiny model; what it printed."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(out.parent / "cache"),
    }  # fmt: skip
    if launcher == "accelerate":
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [
        *LAUNCHERS[launcher], "-m", "hf_peft_ext.cli", "train", "examples/recipes/unipelt.yaml",
        f"model={{model_name_or_path: {bert}}}", f"output_dir={out}", "use_cpu=true", "max_steps=4",
        "max_train_samples=32", "max_eval_samples=16", "logging_steps=1", "eval_strategy=no", "save_strategy=steps",
        "save_steps=2", "load_best_model_at_end=false", "disable_tqdm=true", "warmup_steps=0", *changes,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_train_as_one(bert, tmp_path):
    """torchrun, accelerate: saved once and whole, and, with the same rows in each step, as one process trains it."""
    alone = tmp_path / "python"
    finished = launch("python", bert, alone, "per_device_train_batch_size=32")
    assert finished.returncode == 0, finished.stderr
    expected = load_file(alone / "adapter_model.safetensors")
    for launcher in ("torchrun", "accelerate"):
        out = tmp_path / launcher
        finished = launch(launcher, bert, out, "per_device_train_batch_size=16")
        assert finished.returncode == 0, finished.stderr
        assert "32 rows a step, 2 processes on cpu" in finished.stdout
        assert finished.stdout.count("hf-peft-ext push") == 1  # one process speaks
        assert {file.name for file in out.iterdir()} == {file.name for file in alone.iterdir()}
        found = load_file(out / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
        base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=8)
        model = PeftModel.from_pretrained(base, out)
        loaded = get_peft_model_state_dict(model)
        assert all(torch.equal(loaded[name], value) for name, value in found.items())
        record = json.loads((out / "training_record.json").read_text())
        one = json.loads((alone / "training_record.json").read_text())
        losses, same = ([e["loss"] for e in r["history"] if "loss" in e] for r in (record, one))
        assert losses == pytest.approx(same, rel=1e-3)


@pytest.mark.slow
def test_processes_without_a_group_stop(bert, tmp_path):
    """torchrun on CPUs without `use_cpu` would train twice, side by side; instead it stops and writes nothing."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the processes form a group")
    finished = launch("torchrun", bert, tmp_path / "out", "use_cpu=false")
    assert finished.returncode != 0
    assert finished.stderr.count("2 processes were started, but train as 1: on CPUs, add `use_cpu=true`") == 1
    assert not (tmp_path / "out").exists()


def test_configs_are_read():
    """accelerate knows every key of the configs of examples/launch/, and reads from them what their names say."""
    folder = ROOT / "examples" / "launch"
    kinds = {file: load_config_from_file(str(folder / file)).distributed_type for file in ("ddp.yaml", "fsdp.yaml")}
    assert kinds == {"ddp.yaml": "MULTI_GPU", "fsdp.yaml": "FSDP"}
    assert load_config_from_file(str(folder / "fsdp.yaml")).fsdp_config["fsdp_version"] == 2
    assert HfDeepSpeedConfig(str(folder / "deepspeed_zero2.json")).is_zero2()
    assert HfDeepSpeedConfig(str(folder / "deepspeed_zero3.json")).is_zero3()


CONFIGS = {
    "unipelt": lambda: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4),
    "mam": lambda: MAMConfig(num_virtual_tokens=4, bottleneck_size=4),
    "ladder": lambda: LadderConfig(r=4),
    "compacter": lambda: CompacterConfig(r=8),
}


def units(model):
    """The modules that accelerate shards by themselves: blocks, by the names of their classes."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    return [module for module in reversed(list(model.modules())) if policy(module)]


def model_with(method, backbone):
    model = get_peft_model(BACKBONES[backbone].build(), CONFIGS[method]())
    randomise(model)
    return model


def loss_of(y):
    return (y * torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(2))).mean()


def stepped(model):
    """The adapter's state after one step of plain gradient descent."""
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_peft_model_state_dict(model, state_dict=get_model_state_dict(model, options=options))


def sharded_worker(rank, folder, method, backbone):
    """One of two processes: its half of the batch through the sharded model; gradients and adapter to a file."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = model_with(method, backbone)
    blocks = units(model)
    assert len(blocks) >= 2
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    inputs = {key: value[2 * rank : 2 * rank + 2] for key, value in BACKBONES[backbone].inputs(batch=4).items()}
    loss_of(output(model, inputs)).backward()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    gradients = {
        n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    state = stepped(model)  # gathered by both processes
    if rank == 0:
        torch.save((gradients, state), f"{folder}/found.pt")
    torch.distributed.barrier()
    os._exit(0)  # as in tests/test_training.py


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        *(("unipelt", b) for b in ("bert", "llama", "t5")),
        ("mam", "llama"),
        ("compacter", "bert"),
        ("ladder", "bert"),
        ("ladder", "t5"),
    ],
)
def test_sharded_equals_whole(method, backbone, tmp_path):
    """FSDP2 over two gloo processes, with accelerate's units, gives the gradients of one process on the joined batch,
    and the same adapter after a step.
    """
    torch.multiprocessing.spawn(sharded_worker, (str(tmp_path), method, backbone), nprocs=2)
    model = model_with(method, backbone)
    loss_of(output(model, BACKBONES[backbone].inputs(batch=4))).backward()
    found, state = torch.load(tmp_path / "found.pt")
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    whole = stepped(model)
    assert state.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-7, msg=name)
