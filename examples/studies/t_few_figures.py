"""The two figures of the T-Few study: training against examples in the prompt, and what losses and methods add."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

Condition = tuple[str, str]  # method, losses
Scores = Mapping[tuple[str, Condition], Mapping[int, float]]  # task, condition -> seed -> accuracy in %

ZERO_SHOT: Condition = ("zero-shot", "")
IN_CONTEXT: Condition = ("in-context", "")
T_FEW: Condition = ("(IA)3", "LM+LN+UL")
WAYS = {"no examples": ZERO_SHOT, "examples in the prompt": IN_CONTEXT, "trained on examples (T-Few)": T_FEW}
COLORS = {"no examples": "0.6", "examples in the prompt": "C1", "trained on examples (T-Few)": "C0"}
STEPS: dict[str, tuple[Condition, Condition]] = {  # a row of the second figure -> from, to
    "(IA)3: choice loss added": (("(IA)3", "LM"), ("(IA)3", "LM+LN")),
    "(IA)3: unlikelihood loss added": (("(IA)3", "LM+LN"), T_FEW),
    "LoRA: choice loss added": (("LoRA", "LM"), ("LoRA", "LM+LN")),
    "LoRA: unlikelihood loss added": (("LoRA", "LM+LN"), ("LoRA", "LM+LN+UL")),
    "UniPELT: choice loss added": (("UniPELT", "LM"), ("UniPELT", "LM+LN")),
    "UniPELT: unlikelihood loss added": (("UniPELT", "LM+LN"), ("UniPELT", "LM+LN+UL")),
    "LoRA in place of (IA)3, all losses": (T_FEW, ("LoRA", "LM+LN+UL")),
    "UniPELT in place of (IA)3, all losses": (T_FEW, ("UniPELT", "LM+LN+UL")),
}


def draw(scores: Scores, file: Path) -> None:
    """A row a task that all three ways were run on: a dot for each seed, a bar for the mean."""
    tasks = {task: None for task, _ in scores}
    rows = [task for task in tasks if all(scores.get((task, way)) for way in WAYS.values())]
    figure = Figure(figsize=(7.5, 0.45 * len(rows) + 1.8), layout="constrained")
    axes = figure.subplots()
    for name, way in WAYS.items():
        for place, task in enumerate(rows):
            values = list(scores[task, way].values())
            axes.scatter(values, [place] * len(values), s=18, color=COLORS[name], alpha=0.6, linewidths=0)
            axes.scatter(mean(values), place, s=180, marker="|", color=COLORS[name], label=name if not place else None)
    axes.set_title("Is training on a few examples better than showing them?", fontsize=12, pad=24)
    axes.set_xlabel("accuracy in % (dots: seeds; bars: means)", fontsize=9)
    finish(axes, rows)
    if rows:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=100)


def draw_variants(scores: Scores, file: Path) -> bool:
    """What a loss or another method adds: a dot for each task and seed that both sides were run on, a bar for the
    mean. False, and no file, where no step has two such pairs.
    """
    found = {name: changes for name, (one, other) in STEPS.items() if len(changes := added(scores, one, other)) > 1}
    if not found:
        return False
    figure = Figure(figsize=(7.5, 0.4 * len(found) + 1.6), layout="constrained")
    axes = figure.subplots()
    for place, changes in enumerate(found.values()):
        axes.scatter(changes, [place] * len(changes), s=18, color="C0", alpha=0.6, linewidths=0)
        axes.scatter(mean(changes), place, s=180, marker="|", color="C0")
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_title("What does each loss add, and another method?", fontsize=12)
    axes.set_xlabel("points of accuracy added (dots: a task and a seed; bars: means)", fontsize=9)
    finish(axes, list(found))
    figure.savefig(file, dpi=100)
    return True


def finish(axes: Any, names: list[str]) -> None:
    """Names of the rows, from the top, and a grid that leads to them."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="0.93")
    axes.set_axisbelow(True)


def added(scores: Scores, one: Condition, other: Condition) -> list[float]:
    """Points from one condition to the other, for each task and seed that has both."""
    changes: list[float] = []
    for task in {task: None for task, _ in scores}:
        before, after = scores.get((task, one), {}), scores.get((task, other), {})
        changes += [after[seed] - before[seed] for seed in before if seed in after]
    return changes
