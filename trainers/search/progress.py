"""The progress of a search where there is no terminal: a line a minute on stderr."""

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.progress import Progress, TaskID


class LineAMinute(Progress):
    """Takes what bars take and writes a line at most once a minute, whenever a run is done.

    Args:
        columns, disable: as of `rich.progress.Progress`; with `disable` nothing is written.
        seconds: between two lines.
        clock: the time in seconds.
    """

    def __init__(
        self,
        *columns: Any,
        disable: bool = False,
        seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(*columns, disable=True)
        self.silent, self.seconds, self.clock = disable, seconds, clock
        self.said = clock()

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        super().update(task_id, **kwargs)
        if not self.silent and self.clock() - self.said >= self.seconds:
            self.said = self.clock()
            print("; ".join(map(line, self.tasks)), file=sys.stderr, flush=True)


def line(task: Any) -> str:
    """How far one of the bars is."""
    failed = f", {task.fields['failed']}" if task.fields.get("failed") else ""
    return f"{task.description}: {task.completed:.0f} of {task.total or 0:.0f} runs{failed}"
