"""Callbacks of the trainers: the gates of an adapter, the time of a run, and the epoch of data drawn at random."""

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hf_peft_ext.attach.gates import gate_means, gates
from hf_peft_ext.trainers.run_info import peak_bytes

STEPS = 1000  # the median step time is that of the last so many steps


class GateLog(TrainerCallback):
    """Logs the mean of every gate as gates/LAYER.SUBLAYER; padding is excluded.

    The mean is over the first batch of each evaluation. A run without evaluation uses the last training batch whenever
    Trainer logs. The extra forward pass draws no random number, so training is unchanged.

    Args:
        trainer: an adapter's trainer, which hands in its batches.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.means: dict[str, float] = {}  # as logged last
        self._batch: dict[str, Any] | None = None
        self._evaluation_begins = False

    def on_training_batch(self, batch: dict[str, Any]) -> None:
        """Keep a batch that is trained on."""
        self._batch = batch

    def on_evaluation_begin(self) -> None:
        """Keep the next batch of an evaluation."""
        self._batch, self._evaluation_begins = None, True

    def on_evaluation_batch(self, batch: dict[str, Any]) -> None:
        """Keep the first batch of an evaluation."""
        if self._evaluation_begins:
            self._batch, self._evaluation_begins = batch, False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write()

    def after_log(self, logs: dict[str, float]) -> None:
        """Log the gates after a training loss. `on_log` is too early: TRL clears its own metrics after it."""
        if self.trainer.args.eval_strategy == IntervalStrategy.NO and logs.keys() & {"loss", "train_loss"}:
            self.write()

    def write(self) -> None:
        """Log the gates of the kept batch, if it is one for the model and the active adapter has gates."""
        batch, self._batch = self._batch, None
        model = self.trainer.peft_model
        if not isinstance(batch, Mapping) or not gates(model):  # GRPO's rows of prompts are no batch yet
            return
        with self.trainer.compute_loss_context_manager():
            means = gate_means(model, self.trainer.gate_inputs(self.trainer._prepare_inputs(batch)))
        processes = gather_object([means])
        self.means = {name: sum(one[name] for one in processes) / len(processes) for name in means}
        self.trainer.log({f"gates/{name}": round(mean, 4) for name, mean in self.means.items()})


class Clock(TrainerCallback):
    """Measures step time, training time and peak memory, over all parts of a resumed run."""

    def __init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=STEPS)  # seconds
        self.total = 0.0  # seconds since training began or was resumed
        self.peak: int | None = None  # bytes
        self._earlier: tuple[float | None, float | None, int | None] = (None, None, None)
        self._began = self._step_began = 0.0

    def resume(self, step_time: float | None, train_time: float | None, peak_memory: int | None) -> None:
        """Set the values of the part of the run before its checkpoint; None for what was not measured."""
        self._earlier = (step_time, train_time, peak_memory)

    @property
    def step_time(self) -> float | None:
        """Median seconds of an optimizer step; None before the first."""
        return statistics.median(self.steps) if self.steps else self._earlier[0]

    @property
    def train_time(self) -> float | None:
        """Seconds of training; None before the first step."""
        return (self._earlier[1] or 0.0) + self.total if self.steps else self._earlier[1]

    @property
    def peak_memory(self) -> int | None:
        """Bytes: of the GPU since training began, else of the process; None before the first step."""
        return max((peak for peak in (self.peak, self._earlier[2]) if peak is not None), default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.clear()
        self._began = time.perf_counter()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self._step_began)
        self.total = now - self._began
        self.peak = peak_bytes(args.device)


class EpochSetter(TrainerCallback):
    """Calls `set_epoch` of data drawn at random, in a resumed epoch too.

    accelerate's data loader does so in a single process only, and sees `ChoiceRows` in place of the data.

    Args:
        data: training data, with or without `set_epoch`.
    """

    def __init__(self, data: Any):
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(int(state.epoch or 0))
