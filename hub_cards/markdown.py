"""Text from strangers as Markdown that stays text: names, labels, commands and everything else that is not ours.

A short text becomes a code span, a long one a fenced block: in both nothing is markup, in any flavour of Markdown.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from math import floor, isfinite, log10
from operator import index

from hf_peft_ext.model.layer_groups import ranges as ranges

LONGEST = 200  # characters of a name; what is longer tells a reader nothing


def plain(value: object) -> str:
    """One line without control characters, line breaks or marks that turn the direction of writing."""
    text = str(value)[: LONGEST + 1]
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def code(value: object) -> str:
    """A code span, for a paragraph, a list or a heading."""
    text = plain(value)
    ticks = "`" * (1 + longest_run(text))
    space = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def cell(value: object) -> str:
    """A code span, for a cell of a table."""
    text = plain(value)
    if "|" not in text:
        return code(text)
    # how a code span would hold a pipe differs between flavours, and a character by its number is never markup
    return f"<code>{''.join(c if c.isalnum() or c == ' ' else f'&#{ord(c)};' for c in text)}</code>"


def fenced(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any in it."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    lines = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else " " for c in lines)
    ticks = "`" * max(3, 1 + longest_run(lines))
    return f"{ticks}{language}\n{lines}\n{ticks}"


def longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are Markdown already; the columns in `numbers` stand to the right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def listed(items: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def whole(count: int) -> str:
    """A whole number with its thousands apart; a TypeError for anything else, which could be markup."""
    return f"{index(count):,}"


def number(value: float, spread: float | None = None) -> str:
    """Four digits that count; with a spread, as many as it leaves certain, and two of its own."""
    if not spread or not isfinite(spread) or not isfinite(value):
        return f"{value:.4g}" if spread is None else f"{value:.4g} ± {spread:.2g}"
    decimals = min(max(1 - floor(log10(spread)), 0), 8)
    return f"{value:,.{decimals}f} ± {spread:,.{decimals}f}"


def in_units(amount: float, units: Sequence[tuple[float, str]]) -> str:
    """An amount in the largest unit that it fills: bytes in MiB, seconds in minutes."""
    size, unit = next((u for u in units if amount >= u[0]), units[-1])
    return f"{amount / size:.3g} {unit}"


BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
SECONDS = ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))
