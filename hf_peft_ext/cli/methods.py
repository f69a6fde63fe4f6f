"""`hf-peft-ext methods`: the catalogue of methods."""

import json
from typing import TYPE_CHECKING

from rich.console import Console

from hf_peft_ext.cli.failures import one_line, quiet_consoles
from hf_peft_ext.cli.tables import print_table, print_values

if TYPE_CHECKING:
    from hf_peft_ext.catalogue.table import Described


def methods_command(name: str | None, model: str | None, as_json: bool, as_markdown: bool) -> None:
    """Print the catalogue, or the entry of one method.

    Args:
        name: a method; None for all.
        model: a model's Hub id, folder or config.json, to compute sizes; None for no sizes.
        as_json: whether to print JSON in place of the table.
        as_markdown: whether to print Markdown in place of the table.

    Raises:
        typer.Exit: an error was printed.
    """
    out, errors = quiet_consoles()
    with one_line(errors):
        from transformers import AutoConfig
        from transformers.utils import logging

        from hf_peft_ext.catalogue.entries import entry_named, read_entries
        from hf_peft_ext.catalogue.table import describe, markdown

        logging.set_verbosity_error()
        entries = [entry_named(name)] if name else list(read_entries().values())
        config = None if model is None else AutoConfig.from_pretrained(model)
        with errors.status("Building the methods on the meta device"):
            described = list(describe(entries, config))
    if as_json:
        print(json.dumps([one.to_dict() for one in described], indent=1, ensure_ascii=False))
    elif as_markdown:
        print(markdown([one for one in described if not one.entry.refused]), end="")
    elif name:
        print_entry(out, described[0])
    else:
        print_all(out, described)


def print_all(out: Console, described: "list[Described]") -> None:
    """Print the table, what its columns mean, and the methods that are refused."""
    from hf_peft_ext.catalogue.table import KEY

    shown = [one for one in described if not one.entry.refused]
    print_table(out, [one.row() for one in shown], [None if one.traits else "dim" for one in shown])
    out.print(f"[dim]{KEY}[/]", soft_wrap=False)
    refused = ", ".join(one.entry.title for one in described if one.entry.refused)
    out.print(f"Refused: {refused}. `hf-peft-ext methods NAME` has the reason, and a paper.", soft_wrap=False)


def print_entry(out: Console, one: "Described") -> None:
    """Print everything about a method."""
    values = {}
    for key, value in one.to_dict().items():
        if key == "sizes":
            values |= {part: f"{number:,}" if isinstance(number, int) else number for part, number in value.items()}
        elif value not in (None, "", {}):
            values[key.replace("_", " ")] = text(value)
    print_values(out, {key: value for key, value in values.items() if value != ""})


def text(value: object) -> str:
    """A value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value)
    return ", ".join(f"{k}={v!r}" for k, v in value.items()) if isinstance(value, dict) else str(value)
