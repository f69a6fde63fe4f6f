"""Tables for a terminal of any width."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

GAP = 2  # between columns


def print_table(out: Console, rows: Sequence[Mapping[str, str]], styles: Sequence[str | None] = ()) -> None:
    """Print rows with equal keys. A table wider than the console is printed in blocks with the first column in each.

    Args:
        out: the console.
        rows: column -> cell, in plain text.
        styles: a style for each row.
    """
    for columns in column_blocks(rows, out.width):
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        for i, row in enumerate(rows):
            table.add_row(*(escape(row[column]) for column in columns), style=styles[i] if styles else None)
        out.print(table, soft_wrap=False)


def column_blocks(rows: Sequence[Mapping[str, str]], width: int) -> list[list[str]]:
    """The columns in blocks that fit a width, the first column in each.

    Args:
        rows: column -> cell.
        width: characters of a line.
    """
    first, *others = rows[0]
    widths = {column: max(cell_len(text) for text in (column, *(row[column] for row in rows))) for column in rows[0]}
    blocks = [[first]]
    for column in others:
        used = sum(widths[name] + GAP for name in blocks[-1])
        if used + widths[column] > width and len(blocks[-1]) > 1:
            blocks.append([first])
        blocks[-1].append(column)
    return blocks


def print_values(out: Console, values: Mapping[str, str]) -> None:
    """Print names and values, one a line; a long value is wrapped beside its name."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(escape(name), escape(value))
    out.print(table, soft_wrap=False)
