"""Training as users run it: Trainer, TRL, torch.compile, autocast and two processes, each against plain training.

Tiny models on tiny tasks on the CPU; what is equal in theory is asserted equal.
"""

import json
import os

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_peft_ext import LayerPrefixConfig, MAMConfig, UniPELTConfig

from .backbones import BACKBONES, SPECIAL, VOCAB, output
from .methods import METHODS, randomise

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


def classifier():
    config = AutoConfig.for_model("bert", vocab_size=VOCAB, num_labels=2, **SPECIAL, **BACKBONES["bert"].config)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def separable(n=64, length=8):
    """Sentences of two classes: the label is whether token 5 occurs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, VOCAB, (n, length), generator=generator)
    labels = torch.arange(n) % 2
    ids[labels == 1, 2] = 5
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


def unipelt():
    return get_peft_model(
        classifier(),
        UniPELTConfig(bottleneck_size=8, num_virtual_tokens=4, lora_dropout=0.1, task_type=TaskType.SEQ_CLS),
    )


def arguments(folder, **kwargs):
    defaults = {
        **{"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 3},
        **{"per_device_train_batch_size": 16, "learning_rate": 5e-3, "max_steps": 16, "logging_steps": 4},
        **{"save_strategy": "steps", "save_steps": 8, "lr_scheduler_type": "linear"},
    }
    return TrainingArguments(**{**defaults, **kwargs})


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# Trainer


def test_trainer_learns(tmp_path):
    """UniPELT on a tiny BERT solves a separable task; base weights stay as they were."""
    model = unipelt()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model, arguments(tmp_path, max_steps=150, save_strategy="no"), train_dataset=separable())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 0.5
    assert losses[-1] < 0.2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


class StopAt(TrainerCallback):
    """Ends training after some steps, as if it had been interrupted."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_resumed_training_equals_uninterrupted(tmp_path):
    """Stopped at half and resumed from the checkpoint in a new model, training ends at the same weights."""
    whole = unipelt()
    Trainer(whole, arguments(tmp_path / "whole"), train_dataset=separable()).train()
    Trainer(unipelt(), arguments(tmp_path / "half"), train_dataset=separable(), callbacks=[StopAt(8)]).train()
    assert not (tmp_path / "half" / "checkpoint-16").exists()
    resumed = unipelt()
    trainer = Trainer(resumed, arguments(tmp_path / "half"), train_dataset=separable())
    trainer.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-8"))
    assert trainer.state.global_step == 16
    expected, found = trained(whole), trained(resumed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    assert any((found[name] - value).abs().max() > 1e-3 for name, value in trained(unipelt()).items())


def test_checkpoint_holds_the_adapter_only(tmp_path):
    """A checkpoint has no base weights, and loads into a fresh base model with equal outputs."""
    model = unipelt()
    Trainer(model, arguments(tmp_path, max_steps=4, save_steps=4), train_dataset=separable()).train()
    checkpoint = tmp_path / "checkpoint-4"
    names = {file.name for file in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & names
    assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "UNIPELT"
    assert all(
        ".sublayer_of." in key or "classifier" in key for key in load_file(checkpoint / "adapter_model.safetensors")
    )
    again = PeftModel.from_pretrained(classifier(), checkpoint).eval()
    inputs = BACKBONES["bert"].inputs()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


# TRL


def tokenizer():
    """Words w0 to w49 and what a chat needs."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(VOCAB - len(special)))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


SFT = {
    "unipelt": lambda: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, task_type=TaskType.CAUSAL_LM),
    "mam": lambda: MAMConfig(bottleneck_size=4, num_virtual_tokens=4, task_type=TaskType.CAUSAL_LM),
    "layer_prefix": lambda: LayerPrefixConfig(num_virtual_tokens=4, task_type=TaskType.CAUSAL_LM),
}


# 2026-11: TRL's own default for an argument that transformers renames
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("method", SFT)
def test_sft_trainer(method, packing, tmp_path):
    """SFTTrainer with our config and its own defaults trains the adapter alone; the loss falls."""
    trl = pytest.importorskip("trl")
    dataset = Dataset.from_dict({"text": [" ".join(f"w{(i + j) % 7}" for j in range(5 + i % 6)) for i in range(32)]})
    args = trl.SFTConfig(
        **{"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False},
        **{"per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_steps": 24, "logging_steps": 4},
        **{"packing": packing, "max_length": 32, "save_strategy": "no"},
    )
    base = BACKBONES["llama"].build()
    before = {name: p.clone() for name, p in base.named_parameters()}
    trainer = trl.SFTTrainer(
        model=base, args=args, train_dataset=dataset, processing_class=tokenizer(), peft_config=SFT[method]()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameters[f"base_model.model.{name}"], p) for name, p in before.items())
    assert {n for n, p in parameters.items() if p.requires_grad} == {n for n in parameters if ".sublayer_of." in n}


# torch.compile

COMPILED = {
    "unipelt-token": lambda: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, gate_pooling="token"),
    "unipelt-mean": lambda: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, gate_pooling="mean"),
    "mam": METHODS["mam"],
    "houlsby": METHODS["houlsby"],
    "bitfit": METHODS["bitfit"],
}
FAST = ("unipelt-token", "mam")  # several seconds each


def probed(y):
    """A loss whose gradient no norm at the end takes away."""
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).mean()


def gradients(model, y):
    model.zero_grad()
    probed(y.float()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize(
    "method", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in COMPILED]
)
def test_compiles_as_one_graph(method, backbone):
    """torch.compile(fullgraph=True) finds no graph break; outputs and gradients are those of the plain model."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), COMPILED[method]())
    randomise(model)
    kwargs = {"use_cache": False} if backbone == "llama" else {}
    inputs = family.inputs()
    expected = output(model, inputs, **kwargs)
    plain = gradients(model, expected)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    y = output(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs, **kwargs)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    compiled = gradients(model, y)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert plain.keys() <= compiled.keys()
    for name, gradient in compiled.items():  # zero where the plain model has none
        torch.testing.assert_close(
            gradient, plain.get(name, torch.zeros_like(gradient)), rtol=1e-4, atol=1e-7, msg=name
        )


# autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backbone", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method, backbone, dtype):
    """Under autocast the loss is near that of float32, and so are the gradients: finite, float32, same direction."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), METHODS[method]())
    randomise(model)
    torch.manual_seed(0)  # the same experts of AdaMix in both
    full = output(model, family.inputs())
    expected = gradients(model, full)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        half = output(model, family.inputs())
    found = gradients(model, half)
    assert half.isfinite().all()
    assert (half.float() - full).norm() < 0.1 * full.norm()
    assert expected.keys() == found.keys()
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in found.values())
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (expected, found))
    # T5 does not scale its scores: the sharp softmax of this random model makes bfloat16's rounding of keys larger
    assert torch.cosine_similarity(a, b, dim=0) > (0.95 if backbone == "t5" and dtype == torch.bfloat16 else 0.98)


# two processes


def ddp_model(method, backbone):
    model = get_peft_model(BACKBONES[backbone].build(), METHODS[method]())
    randomise(model)
    if backbone == "bert":  # not read by the outputs used here
        model.base_model.model.pooler.requires_grad_(False)
    return model


def ddp_worker(rank, folder, method, backbone):
    """One of two processes: its half of the batch, and the gradients after all-reduce to a file."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = ddp_model(method, backbone)
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    inputs = {key: value[2 * rank : 2 * rank + 2] for key, value in BACKBONES[backbone].inputs(batch=4).items()}
    for _ in range(2):  # a second step fails if the first left a parameter out
        parallel.zero_grad()
        ddp_loss(output(parallel, inputs)).backward()
    torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, f"{folder}/{rank}.pt")
    os._exit(0)  # on the way out of a function DDP's reducer and gloo's thread can wait for each other, for ever


def ddp_loss(y):
    return (y * torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(2))).mean()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize("method", ["unipelt", "mam"])
def test_two_processes_equal_one(method, backbone, tmp_path):
    """DDP over two gloo processes gives the gradients of one process on the joined batch."""
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path), method, backbone), nprocs=2)
    model = ddp_model(method, backbone)
    ddp_loss(output(model, BACKBONES[backbone].inputs(batch=4))).backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
