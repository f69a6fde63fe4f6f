"""Would the planner have chosen as the published results did? A replay of "Distill or Annotate?", Table 3.

    python examples/studies/annotation_replay.py

Kang et al. 2023 (https://arxiv.org/abs/2305.01645) spend budgets on labels or on distillation, for T5-Small on three
tasks. The planner gets parts of the table as its pilot and predicts the rest:

- all: every cell, so this only shows that the curves describe the table;
- others: every cell but those of the budget itself;
- smaller: the cells of smaller budgets; with 5,000 labels also the task's block with 1,000. It is the only one that a
  user could have had beforehand. Budgets with fewer than three points of a curve are left out.

The budgets of Stanceosaurus and FEVER follow from the labels that they buy; the paper's header has those of WLP.
"""

from dataclasses import dataclass, replace

from hf_peft_ext.budget.annotation import central_95
from hf_peft_ext.budget.annotation_inputs import AnnotationInputs
from hf_peft_ext.budget.score_model import ScoreModel
from hf_peft_ext.budget.spending import allocations

GPU_HOUR = 1.875  # dollars for an A40: hours times this price are the budget in every cell
PROTOCOLS = ("all", "others", "smaller")


@dataclass(frozen=True)
class Block:
    """A task with its initial labels.

    Args:
        price_per_label: dollars.
        items_per_hour: unlabelled items for a further GPU hour.
        teacher_hours: GPU hours to train the teacher, the fixed part of the published hours.
        teacher_score: of T5-XXL on the initial labels.
        score_now: of T5-Small on the initial labels.
        cells: budget -> (additional labels, score; unlabelled items, score of the distilled student).
    """

    price_per_label: float
    items_per_hour: float
    teacher_hours: float
    teacher_score: float
    score_now: float
    cells: dict[int, tuple[int, float, int, float]]


TABLE = {
    ("WLP", 1000): Block(0.260, 432, 10, 72.4, 40.7, {
        100: (384, 50.0, 19_000, 71.1), 200: (769, 53.7, 42_000, 71.3),
        300: (1153, 57.8, 65_000, 70.9), 500: (1923, 62.7, 111_000, 70.8)}),
    ("WLP", 5000): Block(0.260, 432, 38, 74.2, 67.4, {
        100: (384, 68.2, 7_000, 65.3), 200: (769, 68.6, 30_000, 71.8),
        300: (1153, 68.7, 53_000, 72.4), 500: (1923, 69.3, 99_000, 72.5)}),
    ("Stanceosaurus", 1000): Block(0.364, 840, 10, 62.5, 37.5, {
        100: (274, 45.4, 37_000, 54.2), 150: (412, 45.5, 60_000, 54.6),
        200: (549, 45.5, 82_000, 56.3), 300: (824, 44.7, 126_000, 56.9)}),
    ("Stanceosaurus", 5000): Block(0.364, 840, 34, 69.6, 49.4, {
        100: (274, 50.7, 17_000, 52.4), 150: (412, 52.6, 40_000, 55.4),
        200: (549, 49.1, 62_000, 56.2), 300: (824, 50.3, 106_000, 60.5)}),
    ("FEVER", 1000): Block(0.129, 2415, 5, 73.5, 49.7, {
        50: (387, 49.7, 54_000, 71.3), 75: (581, 49.7, 86_000, 71.1),
        100: (775, 49.7, 118_000, 71.6), 150: (1162, 49.8, 182_000, 71.7)}),
    ("FEVER", 5000): Block(0.129, 2415, 12.5, 78.0, 67.2, {
        50: (387, 68.2, 35_000, 73.4), 75: (581, 68.1, 67_000, 74.1),
        100: (775, 68.1, 99_000, 74.3), 150: (1162, 68.9, 163_000, 74.8)}),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A cell of the table, and the planner's prediction of it.

    Args:
        task: name of the task.
        labels: initial labels.
        budget: dollars.
        published: strategy -> published score.
        expected: strategy -> expected score.
        intervals: strategy -> central 95 %.
    """

    task: str
    labels: int
    budget: int
    published: dict[str, float]
    expected: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    @property
    def published_winner(self) -> str:
        """The strategy with the higher published score."""
        return max(self.published, key=self.published.__getitem__)

    @property
    def choice(self) -> str:
        """The strategy that the planner chooses."""
        return max(self.expected, key=self.expected.__getitem__)

    @property
    def covered(self) -> int:
        """How many of the two published scores lie in their intervals."""
        return sum(low <= self.published[name] <= high for name, (low, high) in self.intervals.items())


def pilot(task: str, labels: int, budget: int, protocol: str) -> AnnotationInputs:
    """The inputs of the planner for a cell of the table, with the cells that the protocol allows."""
    block = TABLE[task, labels]
    students, teachers, distilled = {labels: block.score_now}, {labels: block.teacher_score}, {labels: {}}
    for other, cell in block.cells.items():
        if (
            protocol == "all"
            or (protocol == "others" and other != budget)
            or (protocol == "smaller" and other < budget)
        ):
            students[labels + cell[0]] = cell[1]
            distilled[labels][cell[2]] = cell[3]
    if protocol == "smaller" and labels == 5000:
        earlier = TABLE[task, 1000]
        teachers[1000] = earlier.teacher_score
        students |= {1000: earlier.score_now} | {1000 + cell[0]: cell[1] for cell in earlier.cells.values()}
        distilled[1000] = {cell[2]: cell[3] for cell in earlier.cells.values()}
    return AnnotationInputs(
        budget=budget,
        price_per_label=block.price_per_label,
        price_per_gpu_hour=GPU_HOUR,
        labels_available=max(students),
        unlabelled_pool=200_000,
        teacher_items_per_hour=block.items_per_hour,
        teacher_training_hours=block.teacher_hours,
        student_scores=students,
        distilled_scores={n: scores for n, scores in distilled.items() if scores},
        teacher_scores=teachers,
        score_range=(0, 100),
    )


def replay(protocol: str) -> list[Row]:
    """The planner's prediction for each cell that the protocol allows."""
    rows = []
    for (task, labels), block in TABLE.items():
        for budget, cell in block.cells.items():
            inputs = pilot(task, labels, budget, protocol)
            try:
                model = ScoreModel.fit(inputs)
            except ValueError:  # fewer than three points
                continue
            # the student starts from its initial labels, which are fewer than the published ones
            at_hand = replace(inputs, labels_available=labels, student_scores={labels: block.score_now})
            model = replace(model, inputs=at_hand)
            plans = {plan.strategy: plan for plan in allocations(model, at_hand)}
            expected = {name: plan.score for name, plan in plans.items()}
            intervals = {name: central_95(model.sample(plan)) for name, plan in plans.items()}
            rows.append(Row(task, labels, budget, {"label": cell[1], "distil": cell[3]}, expected, intervals))
    return rows


def main() -> None:
    """Print the replay."""
    for protocol in PROTOCOLS:
        rows = replay(protocol)
        columns = ("Task", "Labels", "Budget", "Label: published, expected", "Distil: published, expected", "Choice")
        print(f"\n{protocol}\n| {' | '.join(columns)} |")
        print("|---|--:|--:|---|---|---|")
        for row in rows:
            cells = []
            for name in ("label", "distil"):
                low, high = row.intervals[name]
                cells.append(f"{row.published[name]:.1f}, {row.expected[name]:.1f} [{low:.1f}, {high:.1f}]")
            choice = row.choice if row.choice == row.published_winner else f"**{row.choice}** (wrong)"
            print(f"| {row.task} | {row.labels:,} | ${row.budget} | {' | '.join(cells)} | {choice} |")
        right = sum(row.choice == row.published_winner for row in rows)
        always = sum(row.published_winner == "distil" for row in rows)
        covered = sum(row.covered for row in rows)
        print(
            f"{right} of {len(rows)} right; always distilling: {always}; {covered} of {2 * len(rows)} in the intervals"
        )


if __name__ == "__main__":
    main()
