"""Time of a forward pass and of a training step, in bf16, at the shapes of real models."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tables import Row

from .models import FULL, LORA, METHODS, SHAPES, TIMED, Shape, adapted, batch, build, trained
from .part import Part, Setting, find, ratio

ROUNDS, WARM_UP = 10, 3
COMPILED_LAYERS = 2  # compiling takes seconds a layer, and all layers are alike
NAMES = ("Qwen2-0.5B", "Llama-7B", "BERT-base")


def timed(function: Callable[[], Any], setting: Setting) -> float:
    """Median milliseconds."""
    times = []
    rounds, warm_up = (1, 1) if setting.smoke else (ROUNDS, WARM_UP)
    for i in range(warm_up + rounds):
        setting.synchronize()
        start = time.perf_counter()
        function()
        setting.synchronize()
        if i >= warm_up:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def costs(model: Any, called: Callable[..., Any], shape: Shape, setting: Setting, suffix: str = "") -> Row:
    """Milliseconds of a forward pass and of a step with AdamW, whose averages have the weights' type.

    Args:
        model: what is trained.
        called: the model, or what torch.compile made of it.
        suffix: behind the names of the columns.
    """
    inputs = batch(shape, setting)
    optimizer = torch.optim.AdamW(trained(model), 1e-5, fused=setting.on_gpu)

    def step() -> None:
        called(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        called(**inputs)

    model.eval()
    row: Row = {f"forward{suffix}, ms": timed(forward, setting)}
    model.train()
    setting.settle()
    row[f"step{suffix}, ms"] = timed(step, setting)
    row[f"peak of a step{suffix}, GiB"] = setting.peak()
    return row


def eager(name: str, method: str, setting: Setting) -> Row:
    shape = SHAPES[name]
    model = adapted(build(shape, setting), method, shape)
    row: Row = {"trained, million": sum(p.numel() for p in trained(model)) / 1e6}
    return row | costs(model, model, shape, setting)


def compiled(name: str, method: str, setting: Setting) -> Row:
    """The same model without and with torch.compile; what the first call takes is not in the medians."""
    shape = SHAPES[name]
    model = adapted(build(shape, setting, layers=COMPILED_LAYERS), method, shape)
    row = costs(model, model, shape, setting)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    start = time.perf_counter()
    called = torch.compile(model, backend="inductor" if setting.on_gpu else "aot_eager")
    row |= costs(model, called, shape, setting, ", compiled")
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return row | {"graph breaks": breaks, "all of it compiled, s": time.perf_counter() - start}


def compare(rows: list[Row]) -> None:
    """Ratios to full fine-tuning and to LoRA; the bare model's forward pass is that of full fine-tuning."""
    for row in rows:
        for column in [c for c in row if c.endswith(", ms")]:
            for other in (FULL, LORA):
                short = other.split()[0]
                found = ratio(row, find(rows, shape=row["shape"], method=other), column)
                row[f"{column.removesuffix(', ms')} / {short}"] = found


assert set(TIMED) <= {FULL, *METHODS}
NOTE = (
    f"bf16 weights, adapters as peft makes them, AdamW. Medians of {ROUNDS}. The forward pass of full fine-tuning is "
    "that of the bare model."
)
SPEED = Part("Speed, eager", NOTE, ("shape", "method"), dict.fromkeys(NAMES, TIMED), eager, compare)
COMPILED = Part(
    f"Speed with torch.compile, {COMPILED_LAYERS} layers",
    NOTE,
    ("shape", "method"),
    dict.fromkeys(NAMES, TIMED),
    compiled,
    compare,
    {NAMES[0]: TIMED[1:3]},
)
