"""The two figures of the plug-in study: the ways side by side, and what each choice changes."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from runs import Row

Variant = tuple[str, str, str, str]  # condition, module, how W_plug begins, bridge
R_16, R_4 = "16 parameters activation", "4 parameters activation"


def variant(condition: str, module: str = "lora", init: str = "slice", bridge: str = R_16) -> Variant:
    """The runs of a way of training with the usual choices, or with others. A new module has no W_plug."""
    return condition, module, "" if condition == "fresh" else init, bridge


WAYS: dict[str, Variant] = {  # a row of the first figure -> the runs that it shows
    "LoRA on the large model": ("peft", "lora", "", ""),
    "full fine-tuning": ("full", "", "", ""),
    "the small model with its LoRA": ("small", "lora", "", ""),
    "plugged in, not trained": variant("unbridged", bridge=""),
    "plugged in, the paper's bridge": variant("paper"),
    "plugged in, delta bridge, r = 16": variant("delta"),
    "delta bridge, r = 16, scales by MeZO": variant("refined"),
    "delta bridge, r = 16, unlabelled rows": variant("distilled"),
    "plugged in, delta bridge, r = 4": variant("delta", bridge=R_4),
    "new LoRA, delta bridge, r = 16": variant("fresh"),
    "new LoRA, delta bridge, r = 4": variant("fresh", bridge=R_4),
    "new LoRA, MeZO": ("mezo", "lora", "", ""),
}
REFERENCES = list(WAYS)[:3]  # trained by gradients of the large model, or not the large model
VARIED = {"paper": "the paper's bridge", "delta": "delta bridge", "fresh": "new LoRA, delta bridge"}
CHANGES: dict[str, dict[str, str]] = {  # a row of the second figure -> what it changes
    "r = 4": {"bridge": R_4},
    "r = 8": {"bridge": "8 parameters activation"},
    "r = 32": {"bridge": "32 parameters activation"},
    "r = 64": {"bridge": "64 parameters activation"},
    "r = 16 by width": {"bridge": "16 width activation"},
    "with a ladder": {"bridge": f"{R_16} ladder"},
    "W_plug orthogonal": {"init": "orthogonal"},
    "W_plug by least squares": {"init": "least_squares"},
    "channels by Fisher scores": {"bridge": "16 parameters fisher"},
    "channels by magnitude": {"bridge": "16 parameters magnitude"},
    "adapter in place of LoRA": {"module": "adapter"},
    "prefix in place of LoRA": {"module": "prefix"},
}
Gains = dict[tuple[Variant, str], list[float]]  # variant, task -> one for each seed
POINTS = "points of accuracy over the untouched model"


def gains(rows: list[Row], column: str = "accuracy") -> Gains:
    """The gains of every seed over the untouched model, in points."""
    base = {(row["task"], row["seed"]): float(row["accuracy"]) for row in rows if row["condition"] == "untouched"}
    found: Gains = {}
    for row in rows:
        before = base.get((row["task"], row["seed"]))
        if before is not None and row[column] != "":
            key = (row["condition"], row["module"], row["init"], row["bridge"])
            found.setdefault((key, row["task"]), []).append(100 * (float(row[column]) - before))
    return found


def draw(rows: list[Row], file: Path) -> None:
    """The ways side by side, a panel a task: a dot for each seed, a bar for the mean, a diamond for the mean at the
    scale chosen on dev rows.
    """
    base = [row for row in rows if row["condition"] == "untouched"]
    tasks = sorted({row["task"] for row in base})
    found, safe = gains(rows), gains(rows, "safe")
    names = [name for name, key in WAYS.items() if any((key, task) in found for task in tasks)]
    figure = Figure(figsize=(2.6 * len(tasks) + 3.4, 0.3 * len(names) + 1.6), layout="constrained")
    figure.suptitle("Does an adapter of a small model help a large one?", fontsize=12)
    panels = figure.subplots(1, max(len(tasks), 1), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=False):
        for place, name in enumerate(names):
            color = "C1" if name in REFERENCES else "C0"
            points(axes, found.get((WAYS[name], task), []), place, color)
            if (WAYS[name], task) in safe:
                axes.plot(mean(safe[WAYS[name], task]), place, "D", mfc="none", color="0.3", markersize=5)
        untouched = 100 * mean(float(row["accuracy"]) for row in base if row["task"] == task)
        axes.set_title(f"{task} (untouched: {untouched:.1f} %)", fontsize=10)
    finish(panels, names, f"{POINTS}\n(diamond: at the scale chosen on dev rows; orange: for comparison)")
    figure.savefig(file, dpi=100)


def draw_variants(rows: list[Row], file: Path) -> bool:
    """What each choice changes, on the task with most variants: a panel a way of training, a dot for each seed, a
    dashed line for the usual choices. False, and no file, where fewer than two variants have been run.
    """
    found = gains(rows)
    by_task = {
        task: [name for name in CHANGES if any(changed(found, c, name, task) for c in VARIED)] for _, task in found
    }
    task = max(by_task, key=lambda task: len(by_task[task]), default="")
    names = by_task.get(task, [])
    if len(names) < 2:
        return False
    figure = Figure(figsize=(10, 0.3 * len(names) + 1.8), layout="constrained")
    figure.suptitle(f"Which choices matter? Each row changes one thing ({task})", fontsize=12)
    panels = figure.subplots(1, len(VARIED), sharey=True, sharex=True, squeeze=False)[0]
    for axes, (condition, title) in zip(panels, VARIED.items(), strict=True):
        for place, name in enumerate(names):
            points(axes, changed(found, condition, name, task), place, "C0")
        usual = found.get((variant(condition), task), [])
        if usual:
            axes.axvline(mean(usual), color="C1", linestyle="--", linewidth=1, zorder=0)
        axes.set_title(title, fontsize=10)
    finish(
        panels,
        names,
        f"{POINTS}\n(dashed: LoRA, r = 16 by parameters, W_plug a slice; most variants have one seed)",
    )
    figure.savefig(file, dpi=100)
    return True


def changed(found: Gains, condition: str, name: str, task: str) -> list[float]:
    """The gains with one choice changed; none where the condition does not have that choice."""
    key = variant(condition, **CHANGES[name])
    return [] if key == variant(condition) else found.get((key, task), [])


def points(axes: Any, values: list[float], place: int, color: str) -> None:
    """A dot for each seed and a bar for their mean."""
    axes.scatter(values, [place] * len(values), s=16, color=color, alpha=0.6, linewidths=0)
    if values:
        axes.scatter(mean(values), place, s=140, marker="|", color=color)


def finish(panels: Any, names: list[str], label: str) -> None:
    """Names of the rows, a grid that leads to them, and a line where nothing is gained."""
    for axes in panels:
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.grid(axis="y", color="0.93")
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    panels[0].figure.supxlabel(label, fontsize=9)
