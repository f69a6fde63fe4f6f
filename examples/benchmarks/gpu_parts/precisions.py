"""Each method on a base model in each precision, at the shape of Llama-7B: loss, bytes of weights, peak, step."""

import time
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from tables import Row
from torch import nn

from .models import LORA, METHODS, SHAPES, adapted, batch, build, in_4_bits, in_8_bits, trained
from .part import Part, Setting

SHAPE = SHAPES["Llama-7B"]
STEPS = 4
PRECISIONS = ("NF4, double quantization", "NF4", "8-bit", "bfloat16", "float32")
TRIED = (LORA, "UniPELT", "MAM", "bottleneck", "T-Few", "ladder")


def base_model(precision: str, setting: Setting) -> Any:
    """The model with random weights, the same in each precision; prepared as peft says if it is quantized."""
    if precision in ("float32", "bfloat16"):
        return build(SHAPE, setting, dtype=getattr(torch, precision))
    model = build(SHAPE, setting)
    quantized = in_8_bits(model) if precision == "8-bit" else in_4_bits(model, "double" in precision)
    return prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)


def weight_bytes(model: nn.Module) -> tuple[int, float | None]:
    """Bytes of all weights, constants of quantization included; bits a weight of the 4-bit leaves."""
    total = sum(p.nbytes for p in model.parameters())
    packed = count = 0
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            constants = [state.absmax, state.code]
            if state.nested:
                constants += [state.state2.absmax, state.state2.code, state.offset]
            extra = sum(tensor.nbytes for tensor in constants)
            total += extra
            packed += weight.nbytes + extra
            count += state.shape.numel()
        elif (scales := getattr(weight, "SCB", None)) is not None:
            total += scales.nbytes
    return total, 8 * packed / count if count else None


def measure(precision: str, method: str, setting: Setting) -> Row:
    base = base_model(precision, setting)
    total, bits = weight_bytes(base)
    model, inputs = adapted(base, method, SHAPE).train(), batch(SHAPE, setting)
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    setting.settle()
    losses, times = [], []
    for _ in range(STEPS):
        setting.synchronize()
        start = time.perf_counter()
        with torch.autocast(setting.device, torch.bfloat16, enabled=precision != "float32"):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss  # its graph holds the inputs of all 8-bit products
        times.append(time.perf_counter() - start)
    return {
        "weights, GiB": total / 2**30,
        "bits a weight": bits,
        "first loss": losses[0],
        f"loss {STEPS}": losses[-1],
        "peak, GiB": setting.peak(),
        "step, ms": 1e3 * min(times),
    }


assert set(TRIED) <= set(METHODS)
PART = Part(
    f"Methods on base models in five precisions, Llama-7B, {SHAPE.length} tokens, batch 1",
    "GiB (2^30 bytes). Random weights, AdamW at 1e-3, no checkpointing, autocast to bf16 except in float32. The "
    "weights are those of the base model with the constants of its quantization; embeddings, norms and the head are "
    "in float32 where it is quantized. The shortest of the steps.",
    ("precision", "method"),
    {precision: list(TRIED) for precision in PRECISIONS},
    measure,
    smoke={"float32": TRIED[:2], "NF4, double quantization": TRIED[:2]},
)
