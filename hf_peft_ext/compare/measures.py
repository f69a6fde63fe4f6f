"""Measures of a trained method beside its score: memory of a training step, size of the adapter."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import get_peft_model_state_dict
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

PROFILED_STEPS = 2  # the first creates the optimizer's state


class StepMemory(TrainerCallback):
    """Measures the peak memory of the first training steps on a CPU: the model, and all tensors that a step makes.

    The peak of the process (`resource.getrusage`) is no measure: it never falls, and a worker trains many models.
    On a GPU, the trainer's own clock measures the peak.

    Args:
        model: the model that is trained.
    """

    def __init__(self, model: nn.Module):
        self.model, self.profiler = model, None
        self.peak: int | None = None  # bytes

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the first step."""
        if state.global_step == 0 and args.device.type == "cpu":
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with silent_stderr():
                self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End after the last step that is measured."""
        if self.profiler is not None and state.global_step == min(PROFILED_STEPS, state.max_steps):
            self.stop()

    def stop(self) -> None:
        """Read the peak."""
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            with silent_stderr():
                profiler.stop()
            self.peak = tensor_bytes(self.model) + peak_of(profiler)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Drop what libraries in C write to stderr: torch's profiler writes a line at each start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_of(profiler: profile) -> int:
    """The largest number of bytes that were allocated at once since the profiler began."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    if not allocations:
        return 0
    first = allocations[0]["args"]
    before = first["Total Allocated"] - first["Bytes"]  # the counter goes on from earlier profiles
    return max(event["args"]["Total Allocated"] for event in allocations) - before


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def adapter_bytes(model: Any, trains_base: bool) -> int:
    """Bytes to keep for a task: the tensors of the adapter with its head; for full fine-tuning all of the model.

    Args:
        model: the PeftModel.
        trains_base: whether the base model was trained.
    """
    if trains_base:
        return tensor_bytes(model.get_base_model())
    tensors = get_peft_model_state_dict(model).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
