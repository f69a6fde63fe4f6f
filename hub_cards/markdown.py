"""Writes untrusted text (names, labels, commands) as Markdown in which it is not markup.

A short text becomes a code span and a long one a fenced block. Neither contains markup, in any flavour of Markdown.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from math import floor, isfinite, log10
from operator import index

LONGEST = 200  # characters of a name


def single_line(value: object) -> str:
    """A value on one line, without control characters and marks for the direction of writing."""
    text = str(value)[: LONGEST + 1]
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def code(value: object) -> str:
    """A value as a code span, for a paragraph, a list or a heading."""
    text = single_line(value)
    ticks = "`" * (1 + longest_run(text))
    space = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def cell(value: object) -> str:
    """A value as a code span, for a cell of a table."""
    text = single_line(value)
    if "|" not in text:
        return code(text)
    # flavours differ on pipes in code spans; a numeric character reference is never markup
    return f"<code>{''.join(c if c.isalnum() or c == ' ' else f'&#{ord(c)};' for c in text)}</code>"


def fenced(text: str, language: str = "") -> str:
    """A text as a block of code, whose fence is longer than any fence in it."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    lines = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else " " for c in lines)
    ticks = "`" * max(3, 1 + longest_run(lines))
    return f"{ticks}{language}\n{lines}\n{ticks}"


def longest_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table.

    Args:
        header, rows: cells as Markdown.
        numbers: indices of columns that are aligned to the right.
    """
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def listed(items: Iterable[str]) -> str:
    """Items as "a, b and c"."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def whole(count: int) -> str:
    """A whole number with separators for thousands.

    Raises:
        TypeError: `count` is not a whole number, and could be markup.
    """
    return f"{index(count):,}"


def number(value: float, spread: float | None = None) -> str:
    """A number with four significant digits, or with a spread of two and as many as the spread leaves certain."""
    if not spread or not isfinite(spread) or not isfinite(value):
        return f"{value:.4g}" if spread is None else f"{value:.4g} ± {spread:.2g}"
    decimals = min(max(1 - floor(log10(spread)), 0), 8)
    return f"{value:,.{decimals}f} ± {spread:,.{decimals}f}"


def in_units(amount: float, units: Sequence[tuple[float, str]]) -> str:
    """An amount in the largest unit that it reaches, such as bytes in MiB or seconds in minutes."""
    size, unit = next((u for u in units if amount >= u[0]), units[-1])
    return f"{amount / size:.3g} {unit}"


BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
SECONDS = ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))
