"""Progress where there is no terminal: a line a minute on stderr, in place of bars that redraw themselves."""

import sys
import time
from collections.abc import Callable
from typing import Any

import huggingface_hub
import transformers
from transformers import ProgressCallback, TrainerCallback

from .draft import optional

MINUTE = 60.0


class LineAMinute(TrainerCallback):
    """Says once a minute how far training is.

    Args:
        seconds: between two lines.
        clock: the time in seconds.
    """

    def __init__(self, seconds: float = MINUTE, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = seconds, clock
        self.begun = self.said = clock()
        self.first, self.loss = 0, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self.said = self.clock()
        self.first = state.global_step  # of a run that goes on from a checkpoint

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.loss = f", loss {float(logs['loss']):.4g}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done, left = state.global_step - self.first, state.max_steps - state.global_step
        minutes = (self.clock() - self.begun) / 60
        remaining = f"about {minutes / done * left:.0f} min left" if done else ""
        self._say(state, f"step {state.global_step} of {state.max_steps}{self.loss}, {minutes:.0f} min, {remaining}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say(state, f"evaluating after step {state.global_step} of {state.max_steps}")

    def _say(self, state: Any, text: str) -> None:
        if state.is_world_process_zero and self.clock() - self.said >= self.seconds:
            self.said = self.clock()
            print(text, file=sys.stderr, flush=True)


def lines_for_bars(trainer: Any) -> None:
    """Where stderr is no terminal, let a trainer write lines in place of its bar."""
    if not sys.stderr.isatty() and not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LineAMinute())


def no_bars() -> None:
    """Where stderr is no terminal, keep the libraries' own bars (loading, downloads, tokens) out of it."""
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()
        optional("datasets", "train").disable_progress_bars()
