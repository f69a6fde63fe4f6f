"""What training takes at most in memory: a ladder and a bridge against PEFT on the whole model and full fine-tuning.

Shapes of a real model, random weights, AdamW, float32, a step of each in a process of its own. On the CPU the peak is
the largest resident size of the process, less what it had before the model was built; on a GPU what torch has
allocated. The factors are those of Table 6 and 7 of the plug-in paper (Jin et al. 2023), which has for its bridge 7.1
below full fine-tuning and 5.3 to 5.7 below PEFT (GPT2-XL, length 512, batch 8), and 5.1 and 3.5 to 3.6 (T5-3B, batch
1). A bridge without the large model has that in no memory at all; a ladder runs it forward.

    python examples/benchmarks/ladder_memory.py                   # GPT-2-medium, some ten minutes, up to 9 GB
    python examples/benchmarks/ladder_memory.py --device cuda --model gpt2-xl --batch 8
    python examples/benchmarks/ladder_memory.py --device cuda --model t5-3b --batch 1
"""

import multiprocessing
import resource
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, HfArgumentParser, PreTrainedModel

from hf_peft_ext import BottleneckConfig, LadderConfig, LayerPrefixConfig
from hf_peft_ext.pruning import thin_config

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 500}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "t5-3b": ("t5", {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32}),
}
FULL = "full fine-tuning"
PEFT = ("LoRA (peft)", "adapter", "prefix")


def lora(family: str) -> PeftConfig:
    names = ["c_attn"] if family == "gpt2" else ["q", "v"]
    return LoraConfig(r=8, target_modules=names, fan_in_fan_out=family == "gpt2")


# The model of a config, ready to be trained.
Make = Callable[[Any], nn.Module]


def adapted(config: Callable[[str], PeftConfig]) -> Make:
    return lambda shape: get_peft_model(built(shape), config(shape.model_type))


def checkpointed(shape: Any) -> nn.Module:
    model: Any = adapted(lora)(shape)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model


METHODS: dict[str, Make] = {
    FULL: lambda shape: built(shape),
    "LoRA (peft)": adapted(lora),
    "adapter": adapted(lambda _: BottleneckConfig(style="houlsby", r=64)),
    "prefix": adapted(lambda _: LayerPrefixConfig(num_virtual_tokens=30)),
    "LoRA, checkpointing": checkpointed,
    "ladder, r = 8": adapted(lambda _: LadderConfig(r=8)),
    "ladder, r = 16": adapted(lambda _: LadderConfig(r=16)),
    "ladder, model / 16": adapted(lambda _: LadderConfig(r=16, reading="parameters")),
    "bridge alone, model / 16": lambda shape: built(thin_config(shape, 16, "parameters")),
    "bridge alone, r = 16": lambda shape: built(thin_config(shape, 16, "width")),
}


@dataclass
class Arguments:
    """What is measured, and where."""

    model: str = field(default="gpt2-medium", metadata={"help": f"Shapes: {', '.join(SHAPES)}."})
    batch: int = field(default=1, metadata={"help": "Rows of a batch."})
    length: int = field(default=512, metadata={"help": "Tokens of a row."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa, or eager as in 2023, which keeps all scores."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Which rows."})


@dataclass
class Measured:
    """One method.

    Args:
        trained: number of parameters trained.
        peak: bytes.
    """

    trained: int
    peak: int


def built(config: Any) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=config._attn_implementation)


def measure(method: str, args: Arguments) -> Measured:
    """A step of training in this process, with the optimizer as it is after the first."""
    warnings.simplefilter("ignore", FutureWarning)  # 2026-11: transformers and peft among themselves
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kind, sizes = SHAPES[args.model]
    shape = AutoConfig.for_model(kind, **sizes, attn_implementation=args.attention)
    ids = torch.randint(shape.vocab_size, (args.batch, args.length), device=args.device)
    before = psutil.Process().memory_info().rss
    with torch.device(args.device):
        model = METHODS[method](shape).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, foreach=False)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # its averages are there from now on, as in any step but the first
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return Measured(sum(p.numel() for p in weights), peak)


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    found: dict[str, Measured] = {}
    console = Console()
    for method in args.methods:
        with console.status(method), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            found[method] = fresh.submit(measure, method, args).result()
        console.print(f"{method}: {found[method].peak / 2**20:.0f} MiB")
    table = Table("", "trained, million", "peak, MiB", "full / this", *(f"{name} / this" for name in PEFT))
    for method, this in found.items():
        factors = [f"{found[other].peak / this.peak:.2f}" if other in found else "" for other in (FULL, *PEFT)]
        table.add_row(method, f"{this.trained / 1e6:.2f}", f"{this.peak / 2**20:.0f}", *factors)
    console.print(table)


if __name__ == "__main__":
    main()
