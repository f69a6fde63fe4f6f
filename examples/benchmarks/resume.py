"""Compares a run that is killed, also during saves, and resumed with an undisturbed run.

UniPELT on a small BERT with random weights learns whether a word occurs. One run is undisturbed. Another is killed
(SIGKILL) at random moments and restarted with `resume_from_checkpoint` until it is finished. The script prints the
largest differences of a loss and of a weight. It draws both curves to results/resume.png if matplotlib is installed.

    python examples/benchmarks/resume.py                # a minute on two cores
    python examples/benchmarks/resume.py --steps 200 --save_steps 10 --seed 1
"""

import json
import multiprocessing
import random
import shutil
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    PrinterCallback,
    TrainingArguments,
)

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.trainers import AdapterTrainer
from hf_peft_ext.trainers.restore import last_checkpoint

RESULTS = Path("results")


@dataclass
class Arguments:
    """Options of the command."""

    steps: int = field(default=60, metadata={"help": "Optimiser steps of a run."})
    save_steps: int = field(default=4, metadata={"help": "Steps between two checkpoints."})
    seed: int = field(default=0, metadata={"help": "Of the moments at which the run is killed."})
    longest: float = field(default=0.5, metadata={"help": "Most seconds from a checkpoint to a kill."})


def train(folder: Path, args: Arguments) -> None:
    """A run, from the last complete checkpoint if there is one."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    settings = TrainingArguments(
        str(folder), max_steps=args.steps, save_steps=args.save_steps, save_total_limit=2, logging_steps=1,
        per_device_train_batch_size=16, learning_rate=5e-3, use_cpu=True, report_to="none", disable_tqdm=True, seed=3,
    )  # fmt: skip
    adapter = UniPELTConfig(task_type="SEQ_CLS", bottleneck_size=8, num_virtual_tokens=4, lora_dropout=0.1)
    trainer = AdapterTrainer(backbone(), settings, peft_config=adapter, train_dataset=sentences())
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) is not None)


def backbone() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, num_labels=2, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def sentences(n: int = 256, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Sentences of two classes: the label is whether word 5 occurs."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(6, 60, (n, length), generator=generator), torch.arange(n) % 2
    ids[labels == 1, 2] = 5
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": y} for row, y in zip(ids, labels)]  # noqa: B905


def killed_until_done(folder: Path, args: Arguments) -> list[int]:
    """Restart the run until it is finished, killing it at random moments. Returns the last checkpoint at each kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_peft_ext.trainers"])
    moments, reached = random.Random(args.seed), [0]
    while True:
        process = context.Process(target=train, args=(folder, args))
        process.start()
        while process.is_alive() and step_of(folder) == reached[-1]:
            time.sleep(0.005)
        process.join(timeout=moments.uniform(0, args.longest))  # somewhere in the next steps and saves
        if process.exitcode is not None:
            return reached[1:]
        process.kill()
        process.join()
        reached.append(step_of(folder))


def step_of(folder: Path) -> int:
    last = last_checkpoint(folder)
    return int(last.rpartition("-")[2]) if last else 0


def curve(folder: Path, steps: int) -> dict[int, float]:
    state = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def draw(whole: dict[int, float], resumed: dict[int, float], reached: list[int]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(whole.keys(), whole.values(), color="#9ecae1", linewidth=5, label="left alone")
    axes.plot(resumed.keys(), resumed.values(), color="#1a1a2e", linewidth=1, label="killed and resumed")
    for i, step in enumerate(reached):
        axes.axvline(step, color="#d1495b", linestyle=":", label=None if i else "resumed from here")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "resume.png", dpi=150)


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()  # pyright: ignore[reportArgumentType]
    runs = RESULTS / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    train(runs / "whole", args)
    reached = killed_until_done(runs / "killed", args)
    whole, resumed = curve(runs / "whole", args.steps), curve(runs / "killed", args.steps)
    weights = [load_file(runs / name / f"checkpoint-{args.steps}" / "adapter_model.safetensors")
               for name in ("whole", "killed")]  # fmt: skip
    loss = max(abs(whole[step] - resumed[step]) for step in whole)
    weight = max((value - weights[1][name]).abs().max().item() for name, value in weights[0].items())
    print(f"{args.steps} steps, a checkpoint every {args.save_steps}")
    print(f"killed {len(reached)} times, resumed from {reached}")
    print(f"largest difference of a loss: {loss:g}; of a weight: {weight:g}")
    if find_spec("matplotlib"):
        draw(whole, resumed, reached)
        print(f"curves: {RESULTS / 'resume.png'}")
    shutil.rmtree(runs)


if __name__ == "__main__":
    main()
