"""Costs that grow with adapters, layers and tokens, each beside the cost of peft's LoRA in the same run.

    idle     a forward pass with 100 inactive adapters, against one without them
    load     `load_adapter` against `PeftModel.from_pretrained`, on a model of 200 layers
    length   a forward pass of 8,192 tokens: time, and peak memory above the model
    help     processor time of `hf-peft-ext --help`

Tiny Llamas with random weights on the CPU, no download. Times are medians of processor time. The variants run in turn,
so that other programs slow all of them equally. Memory is the peak resident size of a fresh process, minus its size
before the forward pass.

    python examples/benchmarks/scale.py                     # five to ten minutes on one core
    python examples/benchmarks/scale.py --parts length --length 4096
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from tables import Row, show, write
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

from hf_peft_ext import BitFitConfig, BottleneckConfig, LayerPrefixConfig, MAMConfig, UniPELTConfig, load_adapter
from hf_peft_ext.pruning.importance import peak_memory

LORA, BASE = "LoRA (peft)", "no adapter"
METHODS: dict[str, Callable[..., PeftConfig]] = {
    LORA: LoraConfig,
    "UniPELT": UniPELTConfig,
    "MAM": MAMConfig,
    "bottleneck": BottleneckConfig,
    "prefix": LayerPrefixConfig,
    "BitFit": BitFitConfig,
}
LONG = (BASE, LORA, "prefix", "UniPELT")
# What each part may cost: times LoRA's, or seconds.
LIMIT_IDLE, LIMIT_LOAD, LIMIT_TIME, LIMIT_MEMORY, LIMIT_HELP = 1.1, 1.5, 1.3, 2.0, 0.5


@dataclass
class Arguments:
    """Options of the command."""

    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "idle, load, length, help."})
    rounds: int = field(default=5, metadata={"help": "Repetitions of each measurement."})
    idle: int = field(default=100, metadata={"help": "Inactive adapters."})
    layers: int = field(default=200, metadata={"help": "Layers of the model that adapters are loaded into."})
    length: int = field(default=8192, metadata={"help": "Tokens of the long forward pass."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    quick: bool = field(default=False, metadata={"help": "Small sizes, to test the script."})
    output: Path = field(
        default=Path(__file__).parent / "results", metadata={"help": "Folder for scale_*.md and scale_*.csv."}
    )

    def __post_init__(self) -> None:
        if self.quick:
            self.rounds, self.idle, self.layers, self.length = 1, 3, 3, 64


def decoder(hidden: int, layers: int, length: int = 64) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "vocab_size": 500}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0}
    config = AutoConfig.for_model("llama", **sizes, **heads, max_position_embeddings=length)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def adapted(model: Any, method: str) -> Any:
    if method == BASE:
        return model
    return get_peft_model(model, METHODS[method](task_type="CAUSAL_LM")).eval()


def tokens(batch: int, length: int) -> dict[str, Any]:
    ids = torch.randint(1, 500, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}


def in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median processor time of each run, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if i:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Any], repeat: int = 1) -> None:
    for _ in range(repeat):
        model(**inputs)


# The parts


def idle(args: Arguments) -> list[Row]:
    inputs, rows = tokens(4, 32), []
    for method in METHODS:
        alone, crowded = (adapted(decoder(64, 4), method) for _ in range(2))
        for i in range(args.idle):
            crowded.add_adapter(f"idle{i}", METHODS[method](task_type="CAUSAL_LM"))
        models = {"alone": alone, "crowded": crowded}
        found = in_turn({k: lambda m=m: forward(m, inputs, repeat=5) for k, m in models.items()}, args.rounds)
        ratio = found["crowded"] / found["alone"]
        times = {"alone, ms": 200 * found["alone"], f"with {args.idle} idle, ms": 200 * found["crowded"]}
        rows.append({"method": method, **times, "ratio": ratio, "at most": LIMIT_IDLE})
    return rows


def load(args: Arguments) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            path = Path(folder) / method
            adapted(decoder(32, args.layers), method).save_pretrained(path)
            found = {"load_adapter": 0.0, "from_pretrained": 0.0}
            for name, function in (("from_pretrained", PeftModel.from_pretrained), ("load_adapter", load_adapter)):
                found[name] = statistics.median(loading(function, path, args) for _ in range(min(3, args.rounds)))
            times = {f"{name}, s": seconds for name, seconds in found.items()}
            ratio = found["load_adapter"] / found["from_pretrained"]
            rows.append({"method": method, **times, "ratio": ratio, "at most": LIMIT_LOAD})
    for row in rows:
        row["load_adapter / LoRA's from_pretrained"] = row["load_adapter, s"] / rows[0]["from_pretrained, s"]
    return rows


def loading(function: Callable[..., Any], path: Path, args: Arguments) -> float:
    """Seconds to load into a fresh model."""
    base = decoder(32, args.layers)
    start = time.process_time()
    function(base, path)
    return time.process_time() - start


def length(args: Arguments) -> list[Row]:
    inputs = tokens(1, args.length)
    models = {method: adapted(decoder(256, 2, args.length), method) for method in LONG}
    times = in_turn({k: lambda m=m: forward(m, inputs) for k, m in models.items()}, min(5, args.rounds))
    memory = {method: fresh(above_model, method, args) / 2**20 for method in LONG}
    rows = []
    for method in LONG:
        row: Row = {"method": method, "time, s": times[method], "time / LoRA": times[method] / times[LORA]}
        row |= {"at most": LIMIT_TIME, "peak, MiB": memory[method], "peak / LoRA": memory[method] / memory[LORA]}
        rows.append({**row, "peak at most": LIMIT_MEMORY})
    return rows


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fresh process, forked from one that has only imported modules."""
    linux = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if linux else "spawn")
    context.set_forkserver_preload(["hf_peft_ext", "transformers.models.auto.modeling_auto"])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(function, *args).result()


def above_model(method: str, args: Arguments) -> int:
    """Bytes that a forward pass needs in addition to the model."""
    quietly(args)
    model = adapted(decoder(256, 2, args.length), method)
    forward(model, tokens(1, 32))  # memory that only the very first forward pass allocates
    before = psutil.Process().memory_info().rss
    forward(model, tokens(1, args.length))
    peak = peak_memory(torch.device("cpu"))
    assert peak is not None, "this system does not report the peak memory of a process"
    return max(peak - before, 1)


def help_time(args: Arguments) -> list[Row]:
    (command,) = entry_points(group="console_scripts", name="hf-peft-ext")
    code = f"import sys; from {command.module} import {command.attr} as app; sys.argv[0] = 'hf-peft-ext'; app()"
    commands = {
        "python -c pass": ("pass",),
        "import peft": ("import peft",),
        "hf-peft-ext --help": (code, "--help"),
    }
    rows = []
    for name, rest in commands.items():
        found = statistics.median(processor_time([sys.executable, "-c", *rest]) for _ in range(min(3, args.rounds)))
        rows.append({"command": name, "seconds": found, "at most": LIMIT_HELP if "--help" in rest else None})
    return rows


def processor_time(command: list[str]) -> float:
    """Seconds of a command and its children, user and system."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


PARTS: dict[str, tuple[str, Callable[[Arguments], list[Row]]]] = {
    "idle": ("Forward pass with inactive adapters", idle),
    "load": ("load_adapter against from_pretrained", load),
    "length": ("A long forward pass", length),
    "help": ("Processor time of --help", help_time),
}


def quietly(args: Arguments) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # 2026-11: transformers and peft among themselves
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise SystemExit(f"`parts` (={unknown}) must be among: {', '.join(PARTS)}.")
    quietly(args)
    console = Console()
    sizes = {"idle": f"{args.idle} adapters", "load": f"{args.layers} layers", "length": f"{args.length} tokens"}
    for part in args.parts:
        title, measure = PARTS[part]
        title = ", ".join([title, sizes[part]] if part in sizes else [title])
        with console.status(title):
            rows = measure(args)
        show(console, title, rows)
        write(args.output, f"scale_{part}", title, rows, f"torch {torch.__version__}, {args.threads} thread(s), CPU.")


if __name__ == "__main__":
    main()
