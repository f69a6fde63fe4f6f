"""Peak memory of the stages of plug-in transfer, beside PEFT on the large model and full fine-tuning.

Shapes of real models, random weights, AdamW, float32; one step of each row in a separate process. On the CPU the peak
is the largest resident size of the process, minus its size before any model was built. On a GPU it is the memory that
torch has allocated. The module is a LoRA, W_plug is trained, and the pruned copy has 1 / 16 of the large model's
parameters.

    "held"      the large model is in memory
    "not held"  only its shapes are, on the meta device; its pruned copy is read from a folder

Tables 6 and 7 of the plug-in paper (Jin et al. 2023) have the same factors. Its bridge needs 7.1 times less than full
fine-tuning and 5.3 to 5.7 times less than PEFT (GPT2-XL, length 512, batch 8); 5.1 and 3.5 to 3.6 (T5-3B, batch 1).

    python examples/benchmarks/plug_in_memory.py                   # GPT-2-medium, half an hour, up to 9 GB
    python examples/benchmarks/plug_in_memory.py --device cuda --model gpt2-xl --batch 8
    python examples/benchmarks/plug_in_memory.py --device cuda --model t5-3b --batch 1
"""

import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, HfArgumentParser

from hf_peft_ext import BottleneckConfig, LadderConfig, LayerPrefixConfig
from hf_peft_ext.pruning.importance import peak_memory
from hf_peft_ext.transfer import MeZO, Projections, PrunedModel, bridge, delta_bridge, importance, plug, pruned_copy
from hf_peft_ext.transfer.refine.mezo import trained

GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12}
T5_SMALL = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
LLAMA_1B = {
    **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "num_key_value_heads": 4,
}
TINY_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
# Name -> the family, the large model, the small one.
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        "gpt2",
        {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 500},
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 500},
    ),
    "tiny t5": (
        "t5",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "vocab_size": 500},
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 500},
    ),
    "tiny llama": (
        "llama",
        {**TINY_LLAMA, "vocab_size": 500},
        {**TINY_LLAMA, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 500},
    ),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, GPT2),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, GPT2),
    "t5-base": ("t5", T5_BASE, T5_SMALL),
    "t5-large": ("t5", {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16}, T5_SMALL),
    "t5-3b": ("t5", {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32}, T5_BASE),
    "llama-7b": ("llama", {}, LLAMA_1B),  # the default sizes of transformers' config
}
TARGETS = {"gpt2": ["c_attn"], "t5": ["q", "v"], "llama": ["q_proj", "v_proj"]}  # of LoRA
FULL = "full fine-tuning"
PEFT = ("LoRA (peft)", "adapter", "prefix")
PACKED = "delta bridge, large in 4 bits"
R = 16.0


@dataclass
class Arguments:
    """Options of the command."""

    model: str = field(default="gpt2-medium", metadata={"help": f"Shapes: {', '.join(SHAPES)}."})
    batch: int = field(default=1, metadata={"help": "Rows of a batch."})
    length: int = field(default=512, metadata={"help": "Tokens of a row."})
    answer: int = field(default=16, metadata={"help": "Tokens that T5's decoder reads."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "Of all weights: float32 or bfloat16."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa, or eager as in 2023, which keeps all scores."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Which rows."})


class Case:
    """Models and batch that all rows share.

    Args:
        args: the command's.
        folder: holds the pruned copy and the large model's hidden states for the batch.
    """

    def __init__(self, args: Arguments, folder: Path):
        self.device, self.folder, self.dtype = args.device, folder, getattr(torch, args.dtype)
        self.family, *sizes = SHAPES[args.model]
        self.large_shape, self.small_shape = (
            AutoConfig.for_model(
                self.family, **size, decoder_start_token_id=0, pad_token_id=0, attn_implementation=args.attention
            )
            for size in sizes
        )
        torch.manual_seed(0)
        ids = torch.randint(self.large_shape.vocab_size, (args.batch, args.length))
        labels = ids[:, : args.answer].clone() if self.family == "t5" else ids
        self.batch: dict[str, Tensor] = {"input_ids": ids.to(self.device), "labels": labels.to(self.device)}

    def large(self) -> Any:
        return built(self.large_shape, self.device, self.dtype)

    def shapes(self) -> Any:
        return built(self.large_shape, "meta", self.dtype)

    def small(self) -> PeftModel:
        return get_peft_model(built(self.small_shape, self.device, self.dtype), lora(self.family))  # pyright: ignore

    def pruned(self, large: Any) -> PrunedModel:
        pruned = PrunedModel.from_pretrained(self.folder / "pruned", large)
        pruned.model.to(self.device, self.dtype)  # pyright: ignore
        return pruned

    def loss(self, model: nn.Module) -> Tensor:
        return model(**self.batch, use_cache=False).loss

    def step(self, model: nn.Module) -> int:
        """A training step with an initialised optimizer. Returns the number of trained parameters."""
        weights = trained(model)
        optimizer = torch.optim.AdamW(weights, foreach=False)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()  # its averages are there from now on, as in any step but the first
        optimizer.zero_grad()
        self.loss(model).backward()
        optimizer.step()
        return sum(p.numel() for p in weights)


def built(config: Any, device: str, dtype: torch.dtype = torch.float32) -> Any:
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return auto.from_config(config, dtype=dtype, attn_implementation=config._attn_implementation)


def lora(family: str) -> PeftConfig:
    return LoraConfig(r=8, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")


# A row: what it does in its process, and how many parameters it trains.
Row = Callable[[Case], int]


def peft(config: Callable[[str], PeftConfig]) -> Row:
    return lambda case: case.step(get_peft_model(case.large(), config(case.family)).train())


def checkpointed(case: Case) -> int:
    model: Any = get_peft_model(case.large(), lora(case.family)).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return case.step(model)


def scored(kind: Any) -> Row:
    def row(case: Case) -> int:
        importance(case.large().eval(), [case.batch], kind)
        return 0

    return row


def cut(case: Case) -> int:
    pruned_copy(case.large(), R, "parameters")
    return 0


def bridged(held: bool = True, projections: Callable[[], Projections] = Projections, **kwargs: Any) -> Row:
    """The paper's bridge: the pruned copy is trained with the module."""

    def row(case: Case) -> int:
        large = case.large() if held else case.shapes()
        cache = case.folder / "rows" if kwargs.get("ladder") and not held else None
        plugged = plug(case.small(), large, projections())
        return case.step(bridge(plugged, case.pruned(large), cache=cache, **kwargs).train())

    return row


def held_by(large: Callable[[Case], Any]) -> Row:
    def row(case: Case) -> int:
        model = large(case)
        with delta_bridge(plug(case.small(), model), case.pruned(model)) as held:
            return case.step(held)

    return row


def by_forward_passes(case: Case) -> int:
    plugged = plug(case.small(), case.large()).eval()
    MeZO(trained(plugged)).step(lambda: case.loss(plugged))
    return sum(p.numel() for p in trained(plugged))


def in_4_bits(case: Case) -> Any:
    auto = AutoModelForSeq2SeqLM if case.family == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(case.folder / "4bit", device_map={"": case.device})


METHODS: dict[str, Row] = {
    FULL: lambda case: case.step(case.large().train()),
    "LoRA (peft)": peft(lora),
    "adapter": peft(lambda _: BottleneckConfig(style="houlsby", r=64)),
    "prefix": peft(lambda _: LayerPrefixConfig(num_virtual_tokens=30)),
    "LoRA, checkpointing": checkpointed,
    "ladder, r = 8": peft(lambda _: LadderConfig(r=8)),
    "ladder, model / 16": peft(lambda _: LadderConfig(r=R, reduce="parameters")),
    "small model, LoRA": lambda case: case.step(case.small().train()),
    "importance, activation": scored("activation"),
    "importance, Fisher": scored("fisher"),
    "cutting": cut,
    "bridge, large held": bridged(),
    "bridge, large not held": bridged(held=False),
    "bridge, large not held, W_plug frozen": bridged(held=False, projections=lambda: Projections(trainable=False)),
    "bridge, large not held, W_plug a slice": bridged(held=False, projections=lambda: Projections("slice")),
    "bridge with ladder, first epoch": bridged(ladder=True),
    "bridge with ladder, later, large not held": bridged(held=False, ladder=True),
    "delta bridge": held_by(Case.large),
    PACKED: held_by(in_4_bits),
    "MeZO": by_forward_passes,
}


@dataclass
class Measured:
    """A row of the table.

    Args:
        trained: number of parameters trained.
        peak: bytes.
    """

    trained: int
    peak: int


def quietly() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # 2026-11: transformers and peft among themselves
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def prepare(args: Arguments, folder: Path) -> None:
    """Write the results of earlier stages: pruned copy, rows cached for the ladder, 4-bit weights."""
    quietly()
    case = Case(args, folder)
    large = case.large()
    pruned_copy(large, R, "parameters").save_pretrained(folder / "pruned")
    if PACKED in args.methods:
        large.save_pretrained(folder / "large")
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        loaded = type(large).from_pretrained(
            folder / "large", quantization_config=config, device_map={"": args.device}
        )
        loaded.save_pretrained(folder / "4bit")
        del loaded
    pruned = case.pruned(large)
    model = bridge(plug(case.small(), large), pruned, ladder=True, cache=folder / "rows")
    with torch.no_grad():
        case.loss(model)


def measure(method: str, args: Arguments, folder: Path) -> Measured:
    quietly()
    case, before = Case(args, folder), psutil.Process().memory_info().rss if args.device == "cpu" else 0
    count = METHODS[method](case)
    peak = peak_memory(torch.device(args.device))
    assert peak is not None, "this system does not report the peak memory of a process"
    return Measured(count, peak - before)


def fresh(console: Console, name: str, device: str, run: Callable[..., Any], *given: Any) -> Any:
    """Call a function in a fresh process, forked from one that has only imported modules.

    With CUDA the process is spawned: importing bitsandbytes opens the device, which a fork does not inherit.
    """
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        context.set_forkserver_preload(["hf_peft_ext.transfer", "transformers.models.auto.modeling_auto"])
    with console.status(name), ProcessPoolExecutor(1, context) as process:
        return process.submit(run, *given).result()


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    for name, given, known in (("model", [args.model], SHAPES), ("methods", args.methods, METHODS)):
        if unknown := [value for value in given if value not in known]:
            raise SystemExit(f"`{name}` (={unknown}) must be among: {'; '.join(known)}.")
    found: dict[str, Measured] = {}
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        fresh(console, "preparing", args.device, prepare, args, Path(folder))
        for method in args.methods:
            found[method] = fresh(console, method, args.device, measure, method, args, Path(folder))
            console.print(f"{method}: {found[method].peak / 2**20:.0f} MiB")
    table = Table(
        Column(no_wrap=True), "trained, million", "peak, MiB", "full / this", *(f"{name} / this" for name in PEFT)
    )
    for method, this in found.items():
        factors = [f"{found[other].peak / this.peak:.2f}" if other in found else "" for other in (FULL, *PEFT)]
        table.add_row(method, f"{this.trained / 1e6:.2f}", f"{this.peak / 2**20:.0f}", *factors)
    console.print(table)


if __name__ == "__main__":
    main()
