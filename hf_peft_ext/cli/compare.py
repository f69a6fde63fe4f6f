"""`hf-peft-ext compare`: which method for a recipe's model and rows."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from hf_peft_ext.cli.failures import one_line, quiet_consoles
from hf_peft_ext.cli.tables import print_table
from hf_peft_ext.recipes.recipe_source import optional

if TYPE_CHECKING:
    from hf_peft_ext.compare import MethodComparison


def compare_command(path: Path, changes: Sequence[str], options: dict[str, Any], as_json: bool) -> None:
    """Compare methods, print the table and the recommendation.

    Args:
        path: the recipe's YAML file.
        changes: each `section.key=value`.
        options: arguments of `compare`; the rates as text.
        as_json: whether to print JSON in place of the table.

    Raises:
        typer.Exit: an error was printed.
    """
    out, errors = quiet_consoles()
    with one_line(errors):
        for module in ("optuna", "matplotlib"):
            optional(module, "search", "A comparison")
        from hf_peft_ext.compare import compare

        options["rates"] = factors(options["rates"])
        result = compare(path, overrides=changes, **options)
    if as_json:
        print(result.to_json())
    else:
        print_result(out, result, Path(options["output_dir"]))


def factors(text: str) -> list[float]:
    """The factors of an option: "1/3,1,3".

    Raises:
        ValueError: one is not a number.
    """
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"`rates` (={text!r}) must be numbers, separated by commas, such as 1/3,1,3.") from error


def print_result(out: Console, result: "MethodComparison", folder: Path) -> None:
    """Print the table, the recommendation, and the paths of the files."""
    print_methods(out, result)
    for note in result.notes:
        out.print(f"[dim]{escape(note)}[/]")
    for method in result.methods:
        if method.error:
            out.print(f"[red]{escape(method.title)}[/]: {escape(method.error)}")
    out.print(f"\n[bold]{escape(result.recommendation)}[/]\n")
    if result.test_score is not None:
        out.print(f"[cyan]test[/]     {result.score} {result.test_score:.3f}, on rows that nothing was chosen by")
    if result.folder is not None:
        out.print(f"[cyan]winner[/]   {escape(result.folder)}")
    out.print(f"[cyan]page[/]     {escape(str(folder / 'compare.html'))}")
    out.print(f"[cyan]numbers[/]  {escape(str(folder / 'compare.json'))}")


def print_methods(out: Console, result: "MethodComparison") -> None:
    """Print the table; columns without a value are left out."""
    rows = result.table()
    shown = [column for column in rows[0] if any(row[column] for row in rows)]
    colors = {"failed": "red"}
    styles = ["bold cyan" if one.name == result.winner else colors.get(one.verdict) for one in result.methods]
    print_table(out, [{column: row[column] for column in shown} for row in rows], styles)
