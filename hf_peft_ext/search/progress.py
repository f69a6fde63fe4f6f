"""The progress of a search without a terminal: a line a minute on stderr."""

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.progress import Progress, TaskID


class SearchLines(Progress):
    """A `rich.progress.Progress` that writes a line in place of its bars, at most once a minute, after a run ends.

    Args:
        columns: as in `rich.progress.Progress`; not used.
        disable: whether to write nothing.
        seconds: least time between two lines.
        clock: gives the time in seconds.
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
        self.last_line = clock()

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        """Update a bar, and write a line if it is time."""
        super().update(task_id, **kwargs)
        if not self.silent and self.clock() - self.last_line >= self.seconds:
            self.last_line = self.clock()
            print("; ".join(map(line, self.tasks)), file=sys.stderr, flush=True)


def line(task: Any) -> str:
    """The state of one bar as text."""
    failed = f", {task.fields['failed']}" if task.fields.get("failed") else ""
    return f"{task.description}: {task.completed:.0f} of {task.total or 0:.0f} runs{failed}"
