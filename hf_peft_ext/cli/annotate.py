"""`hf-peft-ext annotate-or-distil`: how to spend a budget on labels and distillation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from hf_peft_ext.cli.failures import one_line, quiet_consoles
from hf_peft_ext.cli.tables import print_table
from hf_peft_ext.recipes.recipe_source import optional

if TYPE_CHECKING:
    from hf_peft_ext.budget.annotation import AnnotationPlan


def annotate_command(path: Path, changes: Sequence[str], figure: Path | None, as_json: bool) -> None:
    """Print the plan; write its figure.

    Args:
        path: the inputs, a YAML file.
        changes: each `key=value`.
        figure: the figure's file, or None.
        as_json: whether to print JSON in place of the table.

    Raises:
        typer.Exit: an error was printed.
    """
    out, errors = quiet_consoles()
    with one_line(errors):
        if figure is not None:
            optional("matplotlib", "figures", "A figure")
        from hf_peft_ext.budget.annotation import label_or_distil
        from hf_peft_ext.budget.annotation_inputs import AnnotationInputs

        plan = label_or_distil(AnnotationInputs.read(path, changes))
        if figure is not None:
            from hf_peft_ext.budget.annotation_figure import annotation_figure

            annotation_figure(plan).savefig(figure)
    if as_json:
        print(plan.to_json())
        return
    print_plan(out, plan)
    if figure is not None:
        out.print(f"[cyan]figure[/]      {escape(str(figure))}")


def print_plan(out: Console, plan: "AnnotationPlan") -> None:
    """Print the allocations, the best one, break-even budgets and the effect of prices."""
    rows, styles = [], []
    for option in plan.allocations:
        low, high = option.interval or (option.score, option.score)
        amounts = {"labels": option.labels_bought, "LLM labels": option.llm_labels, "distilled on": option.unlabelled}
        row = {
            "strategy": option.strategy,
            "score": f"{option.score:.4g}",
            "95 % interval": f"{low:.4g} to {high:.4g}",
        }
        row |= {"cost": f"{option.cost:,.2f}"} | {name: f"{n:,}" if n else "" for name, n in amounts.items()}
        rows.append(row | {"GPU hours": f"{option.gpu_hours:,.1f}"})
        styles.append("bold cyan" if option is plan.best else None)
    print_table(out, rows, styles)
    sure = f"best in {plan.probability_best:.0%} of the bootstrap draws; {plan.score_now:.4g} without spending"
    out.print(f"[bold]{plan.best.strategy}[/]: expected score {plan.best.score:.4g}, {sure}\n")
    for point in plan.break_even:
        out.print(f"[cyan]break-even[/]  from a budget of {point.budget:,.0f}: {point.better_above}")
    if plan.label_cost_to_match:
        cost = f"{plan.label_cost_to_match:,.0f}"
        out.print(f"[cyan]to match[/]    labels for {cost} reach the distilled student's score")
    for effect in plan.sensitivity:
        limits = [("below", effect.switches_below), ("above", effect.switches_above)]
        texts = [f"{side} {price:,.4g}" for side, price in limits if price is not None]
        change = f"another strategy is best {' or '.join(texts)}"
        change = change if texts else "no price from 1/100 to 100 times changes the best strategy"
        out.print(f"[cyan]price[/]       {effect.price} (={effect.value:g}): {change}")
        for title, (strategy, score) in {"half": effect.at_half, "twice": effect.at_double}.items():
            out.print(f"            at {title} the price: {strategy}, {score:.4g}")
    for note in plan.notes:
        out.print(f"[dim]{escape(note)}[/]")
