"""Peak memory of a training step at the shape of Llama-7B, and of the stages of plug-in transfer."""

from collections.abc import Callable
from typing import Any

import plug_in_memory as stages
import torch
from peft import LoraConfig, PeftConfig, get_peft_model, prepare_model_for_kbit_training
from tables import Row

from hf_peft_ext import LadderConfig, UniPELTConfig

from .models import in_4_bits
from .part import NO_CUDA, Part, Setting, find, ratio

SHAPE, TINY_SHAPE, LENGTH = "llama-7b", "tiny llama", 2048
FULL, LORA, QLORA = "full, AdamW states in bf16", "LoRA", "QLoRA"
LADDER_ANCHOR = "12 GB, half of QLoRA"
PLUG_ANCHOR = "LoRA / this 5.3 to 5.7"


def lora() -> PeftConfig:
    return LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def packed(case: stages.Case, checkpointing: bool = False) -> Any:
    """The model in NF4, prepared as peft says."""
    model = in_4_bits(case.large())
    return prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": False})


def plain(config: Callable[[], PeftConfig]) -> Callable[[stages.Case], Any]:
    return lambda case: get_peft_model(case.large(), config())


def quantised(config: Callable[[], PeftConfig], checkpointing: bool = False) -> Callable[[stages.Case], Any]:
    return lambda case: get_peft_model(packed(case, checkpointing), config())


def unipelt() -> PeftConfig:
    return UniPELTConfig(task_type="CAUSAL_LM")


def ladder() -> PeftConfig:
    return LadderConfig(r=8, task_type="CAUSAL_LM")


# Row -> the model, and what papers have for it.
STEPS: dict[str, tuple[Callable[[stages.Case], Any], str]] = {
    LORA: (plain(lora), ""),
    QLORA: (quantised(lora), ""),
    "QLoRA, checkpointing": (quantised(lora, checkpointing=True), ""),
    "UniPELT": (plain(unipelt), ""),
    "UniPELT, NF4": (quantised(unipelt), ""),
    "ladder": (plain(ladder), ""),
    "ladder, NF4": (quantised(ladder), LADDER_ANCHOR),
    FULL: (lambda case: case.large(), ""),
}
PACKED = "delta bridge, large in NF4"
STAGES: dict[str, str] = {
    "small model, LoRA": "",
    "importance, activation": "",
    "importance, Fisher": "",
    "cutting": "",
    "bridge, large not held": PLUG_ANCHOR,
    "bridge, large not held, W_plug a slice": PLUG_ANCHOR,
    "bridge, large held": PLUG_ANCHOR,
    "delta bridge": PLUG_ANCHOR,
    PACKED: PLUG_ANCHOR,
    "MeZO": "",
}


def arguments(setting: Setting) -> stages.Arguments:
    shape, length = (TINY_SHAPE, 16) if setting.smoke else (SHAPE, LENGTH)
    return stages.Arguments(shape, 1, length, device=setting.device, dtype="bfloat16", methods=[])


def measure(_: str, name: str, setting: Setting) -> Row:
    args = arguments(setting)
    case = stages.Case(args, setting.folder)
    done = setting.folder / "prepared"
    if name not in STEPS and not done.exists():
        stages.prepare(args, setting.folder)
        done.touch()
    if name in STEPS:
        make, anchor = STEPS[name]
        model = make(case)
        setting.settle()
        prepared = "QLoRA" in name or "NF4" in name  # what is not in 4 bits is in float32 then
        with torch.autocast(setting.device, torch.bfloat16, enabled=prepared):
            count = case.step(model.train())
    else:
        anchor = STAGES[name]
        row = stages.held_by(lambda case: in_4_bits(case.large())) if name == PACKED else stages.METHODS[name]
        setting.settle()
        mixed = name.startswith("delta")  # it multiplies bf16 hidden states with LoRA's float32 weights
        with torch.autocast(setting.device, torch.bfloat16, enabled=mixed):
            count = row(case)
    peak = setting.peak()
    return {"trained, million": count / 1e6, "peak, GiB": NO_CUDA if peak is None else peak, "papers": anchor}


def compare(rows: list[Row]) -> None:
    for row in rows:
        for other in (FULL, LORA, QLORA):
            reference = find(rows, method=other)
            row[f"{other.split(',')[0]} / this"] = ratio(reference, row, "peak, GiB") if reference else None


PART = Part(
    f"Peak memory of a step, Llama-7B, {LENGTH} tokens, batch 1",
    "GiB (2^30 bytes) that torch has allocated at most, the model's weights among them. Weights, gradients and "
    "AdamW's averages of full fine-tuning and of the pruned copy are bf16. No checkpointing unless a row says so.",
    ("model", "method"),
    {SHAPE: [*STEPS, *STAGES]},
    measure,
    compare,
)
