"""Prices, plans, table and figure of the study that compares labels with distillation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from hf_peft_ext.budget import AnnotationInputs, BudgetAllocation, label_or_distil
from hf_peft_ext.budget.spending import affordable
from runs import Row

PILOT_SHARES = (0.025, 0.05, 0.1)  # of the unlabelled rows
STRATEGIES = {"label": "C2", "distil": "C0"}
Scores = dict[tuple[str, int, int], dict[int, tuple[float, float]]]  # run, labels, items -> seed -> dev, test in %


@dataclass
class Prices:
    """What labels and distillation cost, in dollars; the paper's task WLP."""

    price_per_label: float = field(default=0.26, metadata={"help": "A label."})
    price_per_gpu_hour: float = field(default=1.875, metadata={"help": "An hour of a GPU."})
    items_per_hour: float = field(default=432, metadata={"help": "Rows distilled in a GPU hour."})
    teacher_hours: float = field(
        default=3, metadata={"help": "GPU hours to train the teacher, besides those by label."}
    )
    teacher_hours_per_label: float = field(default=0.007, metadata={"help": "GPU hours for each of its labels."})
    budgets: list[float] = field(default_factory=lambda: [10, 20, 40, 80], metadata={"help": "Money to spend."})

    def training_hours(self, labels: int) -> float:
        """GPU hours of the teacher's training."""
        return self.teacher_hours + self.teacher_hours_per_label * labels


def bought(prices: Prices, budget: float) -> int:
    """How many labels a budget buys."""
    return affordable(budget, prices.price_per_label, 10**9)


def distilled(prices: Prices, labels: int, budget: float, pool: int) -> int:
    """How many rows are distilled on for what the teacher's training leaves of a budget."""
    rest = budget - prices.training_hours(labels) * prices.price_per_gpu_hour
    return affordable(rest, prices.price_per_gpu_hour / prices.items_per_hour, pool)


def pilot_labels(labels: int) -> list[int]:
    """The sizes of the pilot's training sets: a quarter, half and all of the labels at hand."""
    return [labels // 4, labels // 2, labels]


@dataclass(frozen=True)
class Cell:
    """A budget for one task and number of labels.

    Args:
        task: name of the task.
        labels: labels at hand.
        budget: dollars.
        amounts: strategy -> labels bought, or rows distilled on.
        scores: strategy -> seed -> test score in %; without "distil" if the budget does not pay for it.
        plans: seed -> strategy -> what the plan expects; the first strategy is its choice.
    """

    task: str
    labels: int
    budget: float
    amounts: dict[str, int]
    scores: dict[str, dict[int, float]]
    plans: dict[int, dict[str, BudgetAllocation]]

    def mean(self, strategy: str) -> float:
        """The mean test score over seeds."""
        return fmean(self.scores[strategy].values())

    @property
    def winner(self) -> str:
        """The strategy with the higher mean."""
        return max(self.scores, key=self.mean)

    @property
    def choices(self) -> list[str]:
        """The strategy that each seed's plan chooses."""
        return [next(iter(plan)) for plan in self.plans.values()]

    def expected(self, strategy: str) -> float:
        """The score that the plans expect, the mean over seeds."""
        return fmean(plan[strategy].score for plan in self.plans.values())

    def lost(self, choices: Sequence[str]) -> float:
        """Points below the better strategy, the mean over choices; what cannot be afforded is no choice."""
        best = self.mean(self.winner)
        return fmean(best - self.mean(choice if choice in self.scores else "label") for choice in choices)

    @property
    def covered(self) -> list[bool]:
        """Whether each test score lies in the interval of its seed's plan."""
        return [
            interval[0] <= self.scores[strategy][seed] <= interval[1]
            for seed, plan in self.plans.items()
            for strategy in self.scores
            if (interval := plan[strategy].interval) is not None
        ]


def scores_of(rows: Sequence[Row], task: str) -> Scores:
    """The scores of a task's runs."""
    scores: Scores = {}
    for row in rows:
        if row["task"] == task:
            key = row["run"], int(row["labels"]), int(row["items"])
            scores.setdefault(key, {})[int(row["seed"])] = 100 * float(row["dev"]), 100 * float(row["test"])
    return scores


def cells(rows: Sequence[Row], prices: Prices, pool: int, dev_rows: int) -> list[Cell]:
    """The cells of all tasks, each with the seeds whose runs are complete."""
    made = []
    for task in dict.fromkeys(row["task"] for row in rows):
        scores = scores_of(rows, task)
        for labels in sorted({labels for run, labels, _ in scores if run == "teacher"}):
            for budget in sorted(prices.budgets):
                cell = cell_of(scores, prices, pool, dev_rows, task, labels, budget)
                if cell is not None:
                    made.append(cell)
    return made


def cell_of(
    scores: Scores, prices: Prices, pool: int, dev_rows: int, task: str, labels: int, budget: float
) -> Cell | None:
    """A cell; None where no seed has all of its runs."""
    amounts = {"label": bought(prices, budget), "distil": distilled(prices, labels, budget, pool)}
    keys = {"label": ("label", labels + amounts["label"], 0), "distil": ("distil", labels, amounts["distil"])}
    if not amounts["distil"]:
        del keys["distil"]
    pilot = [("label", part, 0) for part in pilot_labels(labels)] + [("teacher", labels, 0)]
    pilot += [("distil", labels, int(pool * share)) for share in PILOT_SHARES]
    seeds = set.intersection(*(set(scores.get(key, {})) for key in [*keys.values(), *pilot]))
    if not seeds:
        return None
    tested = {name: {seed: scores[key][seed][1] for seed in sorted(seeds)} for name, key in keys.items()}
    plans = {
        seed: plan_of({key: scores[key][seed][0] for key in pilot}, prices, pool, dev_rows, labels, budget)
        for seed in sorted(seeds)
    }
    return Cell(task, labels, budget, amounts, tested, plans)


def plan_of(
    pilot: dict[tuple[str, int, int], float], prices: Prices, pool: int, dev_rows: int, labels: int, budget: float
) -> dict[str, BudgetAllocation]:
    """Strategy -> what the planner expects of it, best first; from the dev scores of one seed's pilot."""
    inputs = AnnotationInputs(
        budget=budget,
        price_per_label=prices.price_per_label,
        price_per_gpu_hour=prices.price_per_gpu_hour,
        labels_available=labels,
        unlabelled_pool=pool,
        teacher_items_per_hour=prices.items_per_hour,
        teacher_training_hours=prices.training_hours(labels),
        student_scores={n: score for (run, n, _), score in pilot.items() if run == "label"},
        distilled_scores={labels: {items: score for (run, _, items), score in pilot.items() if run == "distil"}},
        teacher_scores={labels: pilot["teacher", labels, 0]},
        score_range=(0, 100),
        score_sd=100 * (0.25 / dev_rows) ** 0.5,  # the largest standard error of an accuracy
    )
    return {plan.strategy: plan for plan in label_or_distil(inputs).allocations}


def report(rows: Sequence[Row], prices: Prices, pool: int, dev_rows: int, folder: Path) -> str:
    """Write table.md and figure.png; the table's text."""
    made = cells(rows, prices, pool, dev_rows)
    text = f"{table(made)}\n\n{start_table(rows)}\n\n{summary(made)}\n" if made else "No budget has all of its runs.\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    if made:
        draw(made, rows, folder / "figure.png")
    return text


def with_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{fmean(values):.1f}"


def difference(cell: Cell) -> str:
    """Distilled minus labelled: the mean over seeds with its 95 % interval of a paired t-test."""
    if "distil" not in cell.scores:
        return ""
    gains = [cell.scores["distil"][seed] - score for seed, score in cell.scores["label"].items()]
    if len(gains) < 2:
        return f"{gains[0]:+.1f}"
    test: Any = ttest_1samp(gains, 0)
    low, high = test.confidence_interval()
    return f"{fmean(gains):+.1f} [{low:+.1f}, {high:+.1f}]"


def table(made: Sequence[Cell]) -> str:
    """A line for each budget."""
    names = ("task", "N", "budget", "labels bought", "label", "rows distilled", "distil", "distil - label")
    lines = [
        f"| {' | '.join(names)} | planned: label | distil | plans for distil |",
        "|---|" + "--:|" * (len(names) + 2),
    ]
    for cell in made:
        planned = {name: f"{cell.expected(name):.1f}" for name in cell.scores}
        texts = {name: with_spread(list(scores.values())) for name, scores in cell.scores.items()}
        lines.append(
            f"| {cell.task} | {cell.labels} | ${cell.budget:g} | {cell.amounts['label']} | {texts['label']} | "
            f"{cell.amounts['distil'] or ''} | {texts.get('distil', '')} | {difference(cell)} | "
            f"{planned['label']} | {planned.get('distil', '')} | "
            f"{cell.choices.count('distil')} of {len(cell.choices)} |"
        )
    return "\n".join(lines)


def start_table(rows: Sequence[Row]) -> str:
    """The scores before anything is spent: the student on N labels, and the teacher."""
    lines = ["| task | N | small model | teacher |", "|---|--:|--:|--:|"]
    for task in dict.fromkeys(row["task"] for row in rows):
        scores = scores_of(rows, task)
        for labels in sorted({labels for run, labels, _ in scores if run == "teacher"}):
            tested = ([test for _, test in scores[run, labels, 0].values()] for run in ("label", "teacher"))
            lines.append(f"| {task} | {labels} | {' | '.join(map(with_spread, tested))} |")
    return "\n".join(lines)


def summary(made: Sequence[Cell]) -> str:
    """How often the plans were right, beside fixed choices, and what each way of choosing lost."""
    plans = sum(len(cell.plans) for cell in made)
    right = sum(choice == cell.winner for cell in made for choice in cell.choices)
    lines = [f"Plans: {right} of {plans} choose the strategy with the higher mean."]
    for name in STRATEGIES:
        count = sum(cell.winner == name for cell in made)
        lost = fmean(cell.lost([name]) for cell in made)
        lines.append(f'Always "{name}": right for {count} of {len(made)} budgets, {lost:.1f} points lost on average.')
    lines.insert(1, f"The plans lose {fmean(cell.lost(cell.choices) for cell in made):.1f} points on average.")
    covered = [inside for cell in made for inside in cell.covered]
    lines.append(f"{sum(covered)} of {len(covered)} test scores lie in the plans' 95 % intervals.")
    return "\n".join(f"- {line}" for line in lines)


def draw(made: Sequence[Cell], rows: Sequence[Row], file: Path) -> None:
    """A panel for each task and N: test scores and the plans' expectation against the budget."""
    tasks, numbers = (list(dict.fromkeys(values)) for values in zip(*((c.task, c.labels) for c in made), strict=True))
    figure = Figure(figsize=(4.2 * len(numbers), 3.2 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(numbers), squeeze=False)
    for i, task in enumerate(tasks):
        scores = scores_of(rows, task)
        for j, labels in enumerate(numbers):
            axes: Any = panels[i][j]
            draw_panel(axes, [cell for cell in made if (cell.task, cell.labels) == (task, labels)])
            for run, style in (("label", ":"), ("teacher", "-.")):
                if values := [test for _, test in scores.get((run, labels, 0), {}).values()]:
                    what = "small model, nothing spent" if run == "label" else "teacher"
                    axes.axhline(fmean(values), color="0.5", linestyle=style, linewidth=1, label=what)
            axes.set_title(f"{task}, {labels} labels at hand", fontsize=10)
            axes.set(xlabel="dollars", ylabel="accuracy in %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=100)


def draw_panel(axes: Any, of_panel: Sequence[Cell]) -> None:
    """Dots for seeds, lines for means, dashes for what the plans expect."""
    for strategy, color in STRATEGIES.items():
        points = [cell for cell in of_panel if strategy in cell.scores]
        if not points:
            continue
        budgets = [cell.budget for cell in points]
        for cell in points:
            values = list(cell.scores[strategy].values())
            axes.scatter([cell.budget] * len(values), values, s=14, color=color, alpha=0.5, linewidths=0)
        axes.plot(budgets, [cell.mean(strategy) for cell in points], color=color, label=strategy)
        planned = [cell.expected(strategy) for cell in points]
        axes.plot(budgets, planned, color=color, linestyle="--", linewidth=1, label=f"{strategy}, planned")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
