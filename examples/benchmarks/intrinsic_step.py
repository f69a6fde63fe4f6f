"""A training step of intrinsic dimension beside LoRA and full fine-tuning, at the shapes of SmolLM2-135M.

    python examples/benchmarks/intrinsic_step.py                          # three minutes on one core
    python examples/benchmarks/intrinsic_step.py --batch 8 --length 128 --d 100000

Weights are random, in float32. Every round runs one step and one forward without gradients of each variant in turn, so
that other work on the machine hits all alike; the figures are medians over the rounds.
"""

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

from hf_peft_ext import IntrinsicConfig

SHAPES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@dataclass
class Arguments:
    """Options of the command."""

    batch: int = field(default=4, metadata={"help": "Rows of a step."})
    length: int = field(default=64, metadata={"help": "Tokens of a row."})
    d: list[int] = field(default_factory=lambda: [1000, 30_000], metadata={"help": "Trained numbers."})
    rounds: int = field(default=3, metadata={"help": "Rounds; the first is not counted if there are more."})
    layers: int = field(default=30, metadata={"help": "Layers of the model."})
    vocab: int = field(default=49152, metadata={"help": "Size of the vocabulary."})


def variants(args: Arguments) -> dict[str, Any]:
    """Name -> model, ready to train."""
    models: dict[str, Any] = {}
    configs: dict[str, Any] = {"full fine-tuning": None, "LoRA": LoraConfig(r=8, target_modules="all-linear")}
    configs |= {f"intrinsic, d = {d:,}": IntrinsicConfig(d=d) for d in args.d}
    configs |= {
        f"intrinsic, d = {d:,}, no embeddings": IntrinsicConfig(d=d, exclude_modules=["embed_tokens", "lm_head"])
        for d in args.d[:1]
    }
    sizes = {"num_hidden_layers": args.layers, "vocab_size": args.vocab}
    for name, config in configs.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SHAPES, **sizes}))
        models[name] = model if config is None else get_peft_model(model, config)
    return models


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor) -> float:
    """Seconds of a forward."""
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    ids = torch.randint(args.vocab, (args.batch, args.length))
    models = variants(args)
    optimizers = {
        n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-5) for n, m in models.items()
    }
    steps: dict[str, list[float]] = {name: [] for name in models}
    forwards: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            steps[name].append(step(model.train(), optimizers[name], ids))
            forwards[name].append(forward(model.eval(), ids))
    table = Table("variant", "trained", "buffers, MB", "step, s", "of LoRA's", "forward, s", "of LoRA's")
    skipped = int(args.rounds > 1)
    base = median(steps["LoRA"][skipped:]), median(forwards["LoRA"][skipped:])
    for name, model in models.items():
        s, f = median(steps[name][skipped:]), median(forwards[name][skipped:])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        drawn = sum(b.nbytes for b in model.buffers()) / 1e6
        table.add_row(
            name, f"{trained:,}", f"{drawn:.0f}", f"{s:.2f}", f"{s / base[0]:.2f}", f"{f:.2f}", f"{f / base[1]:.2f}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
