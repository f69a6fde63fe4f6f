"""`hf-peft-ext memory`: the memory of a training step, from a model's config alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from peft import PeftConfig
from rich.console import Console

from hf_peft_ext.cli.failures import one_line, quiet_consoles
from hf_peft_ext.cli.tables import print_table
from hf_peft_ext.recipes.recipe_source import optional

if TYPE_CHECKING:
    from hf_peft_ext.budget.memory import MemoryEstimate


def memory_command(
    model: str,
    methods: str | None,
    options: dict[str, Any],
    *,
    card: str | int | None = None,
    largest: str | None = None,
    figure: Path | None = None,
    as_json: bool = False,
) -> None:
    """Estimate the memory of methods, and print the table.

    Args:
        model: Hub id, folder, or config file.
        methods: names of methods, and folders of saved adapters, separated by commas; None for the usual ones.
        options: arguments of `estimate_memory`.
        card: a card, to say what fits.
        largest: "batch" or "length", to find the largest that fits the card.
        figure: a file for the figure.
        as_json: whether to print JSON in place of the table.

    Raises:
        typer.Exit: an error was printed.
    """
    out, errors = quiet_consoles()
    transformers.logging.set_verbosity_error()
    with one_line(errors):
        from hf_peft_ext.budget.memory.cards import card_bytes
        from hf_peft_ext.validation.checks import check

        check("largest", largest, largest is None or card is not None, "needs a `card`")
        if figure is not None:
            optional("matplotlib", "figures", "A figure")
        size = None if card is None else card_bytes(card)
        estimates = estimates_of(model, methods, options)
        fitting = {}
        if largest is not None and card is not None:
            fitting = {title: estimate.largest(largest, card) for title, estimate in estimates.items()}  # type: ignore[arg-type]
        if figure is not None:
            from hf_peft_ext.budget.memory.figure import memory_figure

            memory_figure(estimates, card).savefig(figure, dpi=150)
    if as_json:
        print(
            json.dumps(
                {title: as_dict(estimate, largest, fitting.get(title)) for title, estimate in estimates.items()}
            )
        )
    else:
        print_estimates(out, estimates, size, {f"largest {largest}": fitting} if largest else {})


def estimates_of(model: str, methods: str | None, options: dict[str, Any]) -> "dict[str, MemoryEstimate]":
    """Title -> estimate, of methods by name and of saved adapters."""
    from hf_peft_ext.budget.memory import compare_memory, estimate_memory

    if methods is None:
        return compare_memory(model, **options)
    estimates: dict[str, Any] = {}
    for name in (name.strip() for name in methods.split(",")):
        if Path(name, "adapter_config.json").is_file():
            estimates[name] = estimate_memory(model, PeftConfig.from_pretrained(name), **options)
        else:
            estimates |= compare_memory(model, [name], **options)
    return estimates


def as_dict(estimate: "MemoryEstimate", largest: str | None, value: int | None) -> dict[str, Any]:
    """An estimate for JSON."""
    return estimate.to_dict() | ({f"largest_{largest}": value} if largest else {})


def print_estimates(
    out: Console, estimates: "Mapping[str, MemoryEstimate]", size: int | None, more: Mapping[str, Mapping[str, int]]
) -> None:
    """Print the table: parts as columns, methods as rows.

    Args:
        out: the console.
        estimates: title -> estimate.
        size: bytes of the card, or None.
        more: further columns: name -> title -> value.
    """
    from hf_peft_ext.budget.memory.side_by_side import memory_rows

    rows = memory_rows(estimates)
    for row, (title, estimate) in zip(rows, estimates.items(), strict=True):
        if size is not None:
            row["fits"] = "yes" if estimate.peak <= size else "no"
        row.update({name: str(column[title]) for name, column in more.items()})
    print_table(out, rows)
    out.print(
        "[dim]The framework's share is a constant. Fragmentation of the allocator's memory is not counted.[/]",
        soft_wrap=False,
    )
