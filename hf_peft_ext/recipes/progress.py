"""Progress of training without a terminal: a line a minute on stderr, in place of bars."""

import sys
import time
from collections.abc import Callable
from typing import Any

import huggingface_hub
import transformers
from transformers import ProgressCallback, TrainerCallback

from hf_peft_ext.recipes.recipe_source import optional

MINUTE = 60.0


class TrainingLines(TrainerCallback):
    """Writes the progress of a trainer to stderr, at most once a minute.

    Args:
        seconds: least time between two lines.
        clock: gives the time in seconds.
    """

    def __init__(self, seconds: float = MINUTE, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = seconds, clock
        self.start = self.last_line = clock()
        self.first, self.loss = 0, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = self.last_line = self.clock()
        self.first = state.global_step  # above 0 after resuming

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the last loss."""
        if "loss" in (logs or {}):
            self.loss = f", loss {float(logs['loss']):.4g}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write step, loss and remaining time."""
        done, left = state.global_step - self.first, state.max_steps - state.global_step
        minutes = (self.clock() - self.start) / 60
        remaining = f"about {minutes / done * left:.0f} min left" if done else ""
        self._write(state, f"step {state.global_step} of {state.max_steps}{self.loss}, {minutes:.0f} min, {remaining}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write that the model is evaluated."""
        self._write(state, f"evaluating after step {state.global_step} of {state.max_steps}")

    def _write(self, state: Any, text: str) -> None:
        if state.is_world_process_zero and self.clock() - self.last_line >= self.seconds:
            self.last_line = self.clock()
            print(text, file=sys.stderr, flush=True)


def lines_for_bars(trainer: Any) -> None:
    """Replace a trainer's progress bar by lines, unless stderr is a terminal."""
    if not sys.stderr.isatty() and not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingLines())


def no_bars() -> None:
    """Disable the libraries' progress bars (loading, downloads, tokenization), unless stderr is a terminal."""
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()
        optional("datasets", "train").disable_progress_bars()
