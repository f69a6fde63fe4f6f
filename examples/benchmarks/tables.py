"""Prints the tables of `scale.py` and `gpu.py`, and writes them as Markdown and CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]  # column -> a number, a text, or None


def columns(rows: Sequence[Row]) -> list[str]:
    """The columns of all rows, in order of first occurrence."""
    return list(dict.fromkeys(name for row in rows for name in row))


def cell(value: Any) -> str:
    """A number with three digits; an empty text for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    names = columns(rows)
    table = Table(title=title)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in names))
    console.print(table)


def markdown(title: str, rows: Sequence[Row], note: str = "") -> str:
    names = columns(rows)
    lines = [f"### {title}", "", *([note, ""] if note else [])]
    lines += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(row.get(name)).replace("|", "\\|") for name in names) + " |")
    return "\n".join(lines) + "\n"


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Write a line for each row, with all digits."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write(folder: Path, name: str, title: str, rows: Sequence[Row], note: str = "") -> None:
    """Write `name`.md and `name`.csv into a folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown(title, rows, note), encoding="utf-8")
    write_csv(folder / f"{name}.csv", rows)
