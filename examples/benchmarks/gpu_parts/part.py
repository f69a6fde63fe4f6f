"""A part of `gpu.py`: which processes it starts, which rows each of them measures, and how."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tables import Row

NO_CUDA = "skipped: no CUDA device"


@dataclass(frozen=True)
class Setting:
    """Where a row is measured.

    Args:
        device: "cuda" or "cpu".
        smoke: whether everything is tiny, to see that it runs.
        folder: files that the processes of a part share.
    """

    device: str
    smoke: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def settle(self) -> None:
        """Free what nobody holds; the peak of memory counts from here."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """GiB that torch has allocated at most; None on a CPU, which does not count them."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None


def no_ratios(rows: list[Row]) -> None:
    """Leave the rows as they were measured."""


@dataclass(frozen=True)
class Part:
    """A table of results.

    Args:
        title: what stands over it.
        note: what its columns mean.
        keys: names of the first two columns: the process, and the row.
        jobs: process -> its rows.
        measure: (process, row, setting) -> the other columns.
        finish: adds columns that compare rows; it is called again as rows come in.
        smoke: the processes and rows of a smoke run, where all would take too long.
    """

    title: str
    note: str
    keys: tuple[str, str]
    jobs: Mapping[str, Sequence[str]]
    measure: Callable[[str, str, Setting], Row]
    finish: Callable[[list[Row]], None] = no_ratios
    smoke: Mapping[str, Sequence[str]] | None = None


def ratio(row: Row, other: Row | None, column: str) -> float | None:
    """How a number compares to that of another row; None where one of them is missing."""
    numbers = row.get(column), (other or {}).get(column)
    return numbers[0] / numbers[1] if all(isinstance(n, float) and n > 0 for n in numbers) else None  # pyright: ignore


def find(rows: list[Row], **values: str) -> Row | None:
    """The row with these values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in values.items())), None)
