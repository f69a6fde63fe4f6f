"""Expected scores of the strategies, from the pilot's learning curves."""

from dataclasses import dataclass

import numpy as np

from hf_peft_ext.budget.allocation import BudgetAllocation
from hf_peft_ext.budget.annotation_inputs import AnnotationInputs, mean_score
from hf_peft_ext.budget.learning_curves import MIN_POINTS, Array, LearningCurve, fit_curve
from hf_peft_ext.validation.checks import check


@dataclass(frozen=True)
class ScoreModel:
    """Scores as functions of labels n and unlabelled items U, with `low` the lowest possible score.

    - student on labels: A(n), a learning curve;
    - teacher on labels: T(n), a learning curve, or constant above the largest size with fewer than three;
    - student distilled on U items: low + (T(n) - low) R(U), R a learning curve with asymptote at most 1, or at most
      the pilot's largest ratio if a student exceeded its teacher;
    - student on n labels and m labels of an LLM with error rate e: systematic errors are learned,
      low + (A(n + m) - low) (1 - e m / (n + m)); random ones in K classes make a label worth (1 - e K / (K - 1))^2 of
      a clean one, A(n + (1 - e K / (K - 1))^2 m), after Angluin and Laird 1988, "Learning from Noisy Examples", whose
      sample bound for K = 2 grows with 1 / (1 - 2 e)^2.

    Args:
        inputs: the pilot's inputs.
        student: A.
        relative: R.
        teacher: T, or None.
    """

    inputs: AnnotationInputs
    student: LearningCurve
    relative: LearningCurve
    teacher: LearningCurve | None

    @classmethod
    def fit(cls, inputs: AnnotationInputs, seed: int = 0) -> "ScoreModel":
        """Fit the curves to the pilot.

        Raises:
            ValueError: a curve has fewer than three sizes.
        """
        (low, high), sd = inputs.range, inputs.score_sd
        student = fit_curve("student_scores", inputs.student_scores, (low, high), sd, seed)
        teacher = None
        if len(inputs.teacher_scores) >= MIN_POINTS:
            teacher = fit_curve("teacher_scores", inputs.teacher_scores, (low, high), sd, seed + 1)
        ratios: dict[int, list[float]] = {}
        for labels, scores in inputs.distilled_scores.items():
            span = mean_score(inputs.teacher_scores[labels]) - low
            for items, score in scores.items():
                seeds = [score] if isinstance(score, int | float) else score
                ratios.setdefault(items, []).extend((value - low) / span for value in seeds)
        few = len(ratios) >= MIN_POINTS
        check("distilled_scores", dict(inputs.distilled_scores), few, "must have at least 3 numbers of items")
        top = max(1.0, *(value for seeds in ratios.values() for value in seeds))
        spans = [mean_score(score) - low for score in inputs.teacher_scores.values()]
        relative_sd = None if sd is None else sd / max(spans)
        relative = fit_curve("distilled_scores", ratios, (0.0, top), relative_sd, seed + 2)
        return cls(inputs, student, relative, teacher)

    def student_score(self, labels: int, llm_labels: int = 0) -> float:
        """Expected score of the student trained on labels, some of them of an LLM."""
        size, factor = self.label_value(labels, llm_labels)
        low = self.inputs.range[0]
        return self.clip(low + (float(self.student(size)) - low) * factor)

    def label_value(self, labels: int, llm_labels: int) -> tuple[float, float]:
        """The size at which to read A, and the share of A - low that the errors leave."""
        error = self.inputs.llm_error_rate or 0.0
        if self.inputs.llm_errors == "systematic":
            total = labels + llm_labels
            return total, 1 - error * llm_labels / total
        classes = self.inputs.num_classes
        return labels + max(0.0, 1 - error * classes / (classes - 1)) ** 2 * llm_labels, 1.0

    def teacher_score(self, labels: int) -> float:
        """Expected score of the teacher trained on labels."""
        if self.teacher is not None:
            return self.clip(float(self.teacher(labels)))
        return mean_score(self.inputs.teacher_scores[max(self.inputs.teacher_scores)])

    def distilled_score(self, labels: int, unlabelled: int) -> float:
        """Expected score of the student distilled on unlabelled items, from a teacher trained on labels."""
        low = self.inputs.range[0]
        return self.clip(low + (self.teacher_score(labels) - low) * float(self.relative(unlabelled)))

    def sample(self, plan: BudgetAllocation) -> Array:
        """The score of an allocation in each bootstrap draw; shape: (n_draws,)."""
        low, high = self.inputs.range
        labels = self.inputs.labels_available + plan.labels_bought
        if plan.unlabelled:
            known = self.teacher_score(labels)
            teacher = known if self.teacher is None else np.clip(self.teacher.sample(labels), low, high)
            scores = low + (teacher - low) * self.relative.sample(plan.unlabelled)
        else:
            size, factor = self.label_value(labels, plan.llm_labels)
            scores = low + (self.student.sample(size) - low) * factor
        return np.clip(scores, low, high)

    def clip(self, score: float) -> float:
        """A score within its range."""
        return min(max(score, self.inputs.range[0]), self.inputs.range[1])
