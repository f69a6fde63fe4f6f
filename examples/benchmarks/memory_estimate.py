"""Estimated against measured memory of a training step.

On the CPU: models with random weights of three families, each measured in a fresh process. The measure is the peak of
torch's CPU allocator (its profiler's memory events) over two steps, plus the model's tensors. Forward, loss, backward
and a fused AdamW run for real; the estimate has the config only.

On a GPU: rows of results/gpu/memory.md and precisions.md, which `gpu.py` measured, against new estimates. This part
needs no GPU.

    python examples/benchmarks/memory_estimate.py                 # CPU, five minutes, one core
    python examples/benchmarks/memory_estimate.py --parts gpu     # ten minutes, one core
    python examples/benchmarks/memory_estimate.py --settings 2    # the first two, to see that it runs
"""

import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_parts.models import in_4_bits
from gpu_parts.precisions import weight_bytes
from matplotlib.figure import Figure
from peft import LoraConfig, PeftConfig, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from tables import Row, show, write
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    HfArgumentParser,
)

from hf_peft_ext import BottleneckConfig, LadderConfig, MAMConfig, TFewConfig, UniPELTConfig
from hf_peft_ext.budget import MemoryEstimate, estimate_memory
from hf_peft_ext.compare.measures import peak_of, silent_stderr, tensor_bytes

HERE = Path(__file__).parent
MIB, GIB = 2**20, 2**30
TITLE = "Estimated and measured memory of a training step ({})"
STEPS = 2  # the first creates the optimizer's states
LLAMA = {"vocab_size": 8000, "pad_token_id": 0}
# Family -> the sizes of its models: fields of the config, batch, length.
MODELS: dict[str, dict[str, tuple[dict[str, Any], int, int]]] = {
    "bert": {
        "small": (
            {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
            8,
            128,
        ),
        "large": (
            {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8},
            4,
            128,
        ),
    },
    "llama": {
        "small": (
            LLAMA | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
            4,
            128,
        ),
        "large": (
            LLAMA | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
            2,
            256,
        ),
    },
    "t5": {
        "small": (
            {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 3, "num_heads": 4, "vocab_size": 8000},
            4,
            128,
        ),
        "large": (
            {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 4, "num_heads": 8, "vocab_size": 8000},
            2,
            128,
        ),
    },
}
TASKS: dict[str, tuple[str, Any]] = {
    "bert": ("SEQ_CLS", AutoModelForSequenceClassification),
    "llama": ("CAUSAL_LM", AutoModelForCausalLM),
    "t5": ("SEQ_2_SEQ_LM", AutoModelForSeq2SeqLM),
}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}


@dataclass(frozen=True)
class Case:
    """A setting to measure.

    Args:
        family: BERT classifies, Llama and T5 generate.
        size: "small" or "large".
        method: full, LoRA, UniPELT, ladder.
        dtype: of the weights.
        checkpointing: whether blocks are recomputed.
        nf4: whether the base model is in 4 bits.
    """

    family: str
    size: str
    method: str
    dtype: str = "float32"
    checkpointing: bool = False
    nf4: bool = False

    @property
    def shape(self) -> tuple[Any, int, int]:
        """Config, batch, length."""
        sizes, batch, length = MODELS[self.family][self.size]
        fields = {"decoder_start_token_id": 0, **sizes} if self.family == "t5" else sizes
        return AutoConfig.for_model(self.family, **fields), batch, length

    def adapter(self) -> PeftConfig | None:
        """The config of the adapter."""
        task = TASKS[self.family][0]
        if self.method == "LoRA":
            return LoraConfig(target_modules=TARGETS[self.family], task_type=task)
        makers: dict[str, Any] = {"UniPELT": UniPELTConfig, "ladder": LadderConfig}
        return makers[self.method](task_type=task) if self.method in makers else None


CASES = [
    *(Case(f, size, m) for f in MODELS for size in ("small", "large") for m in ("full", "LoRA", "UniPELT")),
    *(Case(f, "small", m, checkpointing=True) for f in MODELS for m in ("full", "UniPELT")),
    *(Case(f, "small", m, "bfloat16") for f in MODELS for m in ("full", "LoRA")),
    *(Case(f, "small", "ladder") for f in MODELS),
    *(Case("llama", "large", m, nf4=True) for m in ("LoRA", "UniPELT")),
]


@dataclass
class Arguments:
    """Options of the command."""

    parts: list[str] = field(default_factory=lambda: ["cpu"], metadata={"help": "cpu, gpu."})
    settings: int = field(default=len(CASES), metadata={"help": "How many settings of each part."})
    output: Path = field(default=HERE / "results" / "memory_estimate", metadata={"help": "Folder for the results."})


def quietly() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def trained_model(case: Case) -> tuple[Any, int]:
    """The model in training mode, and its bytes with the constants of quantization."""
    config, _, _ = case.shape
    torch.manual_seed(0)
    model = TASKS[case.family][1].from_config(config, dtype=getattr(torch, case.dtype))
    if case.nf4:
        model = in_4_bits(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapter = case.adapter()
    if adapter is not None:
        model: Any = get_peft_model(model, adapter)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapter is not None:
            model.enable_input_require_grads()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return model.train(), weight_bytes(model)[0] + buffers if case.nf4 else tensor_bytes(model)


def measured(case: Case) -> int:
    """Bytes at the peak of two training steps, in this process."""
    quietly()
    model, held = trained_model(case)
    config, rows, length = case.shape
    ids = torch.randint(3, config.vocab_size, (rows, length))
    labels = torch.arange(rows) % 2 if case.family == "bert" else ids.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with silent_stderr():
        profiler.start()
    for _ in range(STEPS):
        options = {} if case.family == "bert" else {"use_cache": False}
        model(input_ids=ids, labels=labels, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with silent_stderr():
        profiler.stop()
    return held + peak_of(profiler)


def estimated(case: Case) -> MemoryEstimate:
    config, rows, length = case.shape
    return estimate_memory(
        config,
        case.adapter(),
        batch=rows,
        length=length,
        dtype=case.dtype,
        gradient_checkpointing=case.checkpointing,
        task_type=TASKS[case.family][0],
        quantization=float32_nf4() if case.nf4 else None,
        device="cpu",
    )


def float32_nf4() -> Any:
    """What `in_4_bits` does."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def cpu_row(case: Case) -> Row:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_peft_ext.transfer", "transformers.models.auto.modeling_auto"])
    with ProcessPoolExecutor(1, context) as process:
        peak = process.submit(measured, case).result()
    start = time.perf_counter()
    estimate = estimated(case)
    row = asdict(case) | {"batch": case.shape[1], "length": case.shape[2], "measured, MiB": peak / MIB}
    seconds = time.perf_counter() - start
    return row | {
        "estimated, MiB": estimate.allocated / MIB,
        "error, %": 100 * (estimate.allocated / peak - 1),
        "estimate, s": seconds,
    }


def markdown_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a table in Markdown."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def lora(**kwargs: Any) -> PeftConfig:
    return LoraConfig(r=8, target_modules=["q_proj", "v_proj"], **kwargs)


GPU_METHODS: dict[str, Any] = {
    "LoRA": lora,
    "LoRA (peft)": lora,
    "QLoRA": lora,
    "UniPELT": UniPELTConfig,
    "MAM": MAMConfig,
    "bottleneck": BottleneckConfig,
    "T-Few": TFewConfig,
    "ladder": LadderConfig,
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "NF4, double quantization": {"dtype": "bfloat16", "quantization": "nf4-dq", "autocast": "bfloat16"},
    "NF4": {"dtype": "bfloat16", "quantization": "nf4", "autocast": "bfloat16"},
    "8-bit": {"dtype": "bfloat16", "quantization": "int8", "autocast": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16", "autocast": "bfloat16"},
    "float32": {"dtype": "float32"},
}


def gpu_cases() -> list[tuple[str, str, int, float, dict[str, Any]]]:
    """Precision, method, length, measured GiB, and the arguments of `estimate_memory`."""
    cases = []
    for row in markdown_rows(HERE / "results" / "gpu" / "memory.md"):
        name, _, option = row["method"].partition(", ")
        is_full = name == "full"
        if not row["peak, GiB"] or (name not in GPU_METHODS and not is_full):
            continue  # plug-in transfer
        is_packed = name == "QLoRA" or option == "NF4"
        precision = "NF4, double quantization" if is_packed else "bfloat16"
        arguments = {**PRECISIONS[precision], "gradient_checkpointing": option == "checkpointing"}
        if not is_packed:
            arguments["autocast"] = None
        arguments["peft_config"] = None if is_full else GPU_METHODS[name](task_type="CAUSAL_LM")
        cases.append((precision, row["method"], 2048, float(row["peak, GiB"]), arguments))
    for row in markdown_rows(HERE / "results" / "gpu" / "precisions.md"):
        adapter = GPU_METHODS[row["method"]](task_type="CAUSAL_LM")
        arguments = {**PRECISIONS[row["precision"]], "peft_config": adapter}
        arguments["optimizer"] = "adamw_torch"
        cases.append((row["precision"], row["method"], 1024, float(row["peak, GiB"]), arguments))
    return cases


def gpu_row(precision: str, method: str, length: int, peak: float, arguments: dict[str, Any]) -> Row:
    config = AutoConfig.for_model("llama", pad_token_id=0)
    estimate = estimate_memory(config, batch=1, length=length, **arguments)
    row: Row = {"precision": precision, "method": method, "length": length, "measured, GiB": peak}
    row |= {"estimated, GiB": estimate.allocated / GIB, "error, %": 100 * (estimate.allocated / GIB / peak - 1)}
    return row | {f"{name}, GiB": size / GIB for name, size in estimate.parts.items() if name != "framework"}


def scatter(rows: list[Row], unit: str, bound: int) -> Figure:
    """Estimated against measured, on logarithmic axes; the dashed lines are the bound."""
    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    axes = figure.subplots()
    group = "family" if "family" in rows[0] else "precision"
    for name in dict.fromkeys(row[group] for row in rows):
        mine = [row for row in rows if row[group] == name]
        x, y = ([row[f"{kind}, {unit}"] for row in mine] for kind in ("measured", "estimated"))
        axes.scatter(x, y, s=22, alpha=0.75, linewidths=0, label=name)
    values = [row[f"{kind}, {unit}"] for row in rows for kind in ("measured", "estimated")]
    ends = [0.85 * min(values), 1.15 * max(values)]
    for share, style in ((0, "-"), (bound / 100, "--"), (-bound / 100, "--")):
        axes.plot(ends, [(1 + share) * end for end in ends], style, color="#8791a5", linewidth=0.8)
    axes.loglog()
    axes.set_xlabel(f"measured, {unit}")
    axes.set_ylabel(f"estimated, {unit}")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def report(console: Console, folder: Path, name: str, rows: list[Row], unit: str, bound: int) -> None:
    """Print the table; write it and its figure."""
    errors = [abs(row["error, %"]) for row in rows]
    within = sum(error <= bound for error in errors)
    note = f"{within} of {len(rows)} within {bound} %; mean error {sum(errors) / len(errors):.1f} %, largest "
    note += f"{max(errors):.1f} %."
    title = TITLE.format(name.upper())
    show(console, title, rows)
    console.print(note)
    write(folder, name, title, rows, note)
    scatter(rows, unit, bound).savefig(folder / f"{name}.svg")


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    if unknown := set(args.parts) - {"cpu", "gpu"}:
        raise SystemExit(f"`parts` (={sorted(unknown)}) must be among: cpu, gpu.")
    quietly()
    console = Console(width=200)
    if "cpu" in args.parts:
        rows = []
        for case in CASES[: args.settings]:
            rows.append(cpu_row(case))
            console.print(case, f"{rows[-1]['error, %']:+.1f} %")
            write(args.output, "cpu", TITLE.format("CPU"), rows)
        report(console, args.output, "cpu", rows, "MiB", 15)
    if "gpu" in args.parts:
        rows = []
        for case in gpu_cases()[: args.settings]:
            rows.append(gpu_row(*case))
            console.print(*case[:3], f"{rows[-1]['error, %']:+.1f} %")
            write(args.output, "gpu", TITLE.format("GPU"), rows)
        report(console, args.output, "gpu", rows, "GiB", 10)


if __name__ == "__main__":
    main()
