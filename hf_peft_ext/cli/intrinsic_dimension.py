"""`hf-peft-ext intrinsic-dimension`: how few numbers must be trained for a recipe's model and rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_peft_ext.cli.compare import factors
from hf_peft_ext.cli.failures import one_line, quiet_consoles
from hf_peft_ext.recipes.recipe_source import optional

if TYPE_CHECKING:
    from hf_peft_ext.intrinsic_dimension import IntrinsicDimension


def intrinsic_dimension_command(path: Path, changes: Sequence[str], options: dict[str, Any], as_json: bool) -> None:
    """Measure the intrinsic dimension, and print the runs and the result.

    Args:
        path: the recipe's YAML file.
        changes: each `section.key=value`.
        options: arguments of `measure_intrinsic_dimension`; the rates as text.
        as_json: whether to print JSON in place of the table.

    Raises:
        typer.Exit: an error was printed.
    """
    out, errors = quiet_consoles()
    with one_line(errors):
        for module in ("optuna", "matplotlib"):
            optional(module, "search", "A measurement")
        from hf_peft_ext.intrinsic_dimension import measure_intrinsic_dimension

        options["rates"] = factors(options["rates"])
        result = measure_intrinsic_dimension(path, overrides=changes, **options)
    if as_json:
        print(result.to_json())
    else:
        print_dimension(out, result, Path(options["output_dir"]))


def print_dimension(out: Console, result: "IntrinsicDimension", folder: Path) -> None:
    """Print the table, the result, and the paths of the files."""
    table = Table("d", "mean", *(f"seed {seed}" for seed in result.scores), box=box.SIMPLE_HEAD, pad_edge=False)
    for d, mean in result.means().items():
        cells = (f"{scores[d]:.3f}" if d in scores else "" for scores in result.scores.values())
        table.add_row(f"{d:,}", f"{mean:.3f}", *cells, style="cyan" if mean >= result.threshold else None)
    table.add_row("all", f"{sum(result.full.values()) / len(result.full):.3f}",
                  *(f"{result.full[seed]:.3f}" if seed in result.full else "" for seed in result.scores))  # fmt: skip
    out.print(table)
    for error in result.errors:
        out.print(f"[red]A run failed[/]: {escape(error)}")
    out.print(f"\n[bold]{escape(result.sentence)}[/]\n")
    out.print(f"[cyan]figure[/]   {escape(str(folder / 'intrinsic_dimension.svg'))}")
    out.print(f"[cyan]numbers[/]  {escape(str(folder / 'intrinsic_dimension.json'))}")
