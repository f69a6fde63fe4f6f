"""The inputs of a plan for labels and distillation: prices, pools, throughputs and pilot scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_peft_ext.budget.learning_curves import Scores, pilot_points
from hf_peft_ext.recipes.recipe_source import RecipeLoader, split_override
from hf_peft_ext.validation.checks import check, check_count, check_positive, is_number
from hf_peft_ext.validation.suggestions import did_you_mean


@dataclass(frozen=True)
class AnnotationInputs:
    """What a plan needs to know. Money is in one currency throughout, and no price has a default.

    Args:
        budget: money to spend, the pilot's cost included.
        price_per_label: money for a label of a human annotator.
        price_per_gpu_hour: money for an hour of one GPU.
        labels_available: labels at hand; the pilot used some or all of them.
        unlabelled_pool: unlabelled items, to be labelled or distilled on.
        teacher_items_per_hour: items a GPU hour in distillation: the teacher's outputs for them, and the training of
            the student if `student_items_per_hour` is None.
        teacher_training_hours: GPU hours to train the teacher on `labels_available` labels. More labels take
            proportionally longer.
        student_scores: pilot: labels -> score of the student trained on them, or a list with one score a seed. At
            least three sizes.
        distilled_scores: pilot: labels of the teacher -> unlabelled items -> score of the distilled student. At least
            three numbers of unlabelled items.
        teacher_scores: pilot: labels -> score of the teacher. With fewer than three sizes the teacher's score is
            assumed not to grow with labels.
        student_items_per_hour: items that the student's whole training handles in a GPU hour, all epochs; None if its
            cost is negligible or part of `teacher_items_per_hour`.
        score_range: lowest and highest possible score.
        score_sd: standard deviation of a score between seeds; None to estimate it from the curves' residuals.
        pilot_cost: money that the pilot takes from the budget.
        llm_price_per_label: money for a label of an LLM; None without this option.
        llm_error_rate: share of the LLM's labels that are wrong.
        llm_errors: "systematic" if the student learns the errors, "random" if they average out.
        num_classes: for random errors.
    """

    budget: float
    price_per_label: float
    price_per_gpu_hour: float
    labels_available: int
    unlabelled_pool: int
    teacher_items_per_hour: float
    teacher_training_hours: float
    student_scores: Scores
    distilled_scores: Mapping[int, Scores]
    teacher_scores: Scores
    student_items_per_hour: float | None = None
    score_range: Sequence[float] = (0.0, 1.0)
    score_sd: float | None = None
    pilot_cost: float = 0.0
    llm_price_per_label: float | None = None
    llm_error_rate: float | None = None
    llm_errors: Literal["systematic", "random"] = "systematic"
    num_classes: int = 2

    def __post_init__(self) -> None:
        optional = {name: getattr(self, name) for name in ("score_sd", "llm_price_per_label")}
        required = ("budget", "price_per_label", "price_per_gpu_hour", "teacher_training_hours", "pilot_cost")
        money = {name: getattr(self, name) for name in required} | {k: v for k, v in optional.items() if v is not None}
        for name, value in money.items():
            check(name, value, is_number(value) and value >= 0, "must be a number of at least 0")
        for name in ("labels_available", "unlabelled_pool", "num_classes"):
            check_count(name, getattr(self, name))
        check_positive("teacher_items_per_hour", self.teacher_items_per_hour)
        if self.student_items_per_hour is not None:
            check_positive("student_items_per_hour", self.student_items_per_hour)
        rule = f"must be at least the pilot's cost, `pilot_cost` (={self.pilot_cost})"
        check("budget", self.budget, self.budget >= self.pilot_cost, rule)
        self.check_annotator()
        self.check_scores()

    def check_annotator(self) -> None:
        """Raise a ValueError unless the options of the LLM are complete and valid."""
        both = (self.llm_price_per_label is None) == (self.llm_error_rate is None)
        check("llm_error_rate", self.llm_error_rate, both, "must be set together with llm_price_per_label")
        if self.llm_error_rate is not None:
            rate = self.llm_error_rate
            check("llm_error_rate", rate, is_number(rate) and 0 <= rate < 1, "must lie in [0, 1)")
        check(
            "llm_errors", self.llm_errors, self.llm_errors in ("systematic", "random"), "must be systematic or random"
        )
        check("num_classes", self.num_classes, self.num_classes > 1, "must be at least 2")

    def check_scores(self) -> None:
        """Raise a ValueError unless the pilot's scores are valid, and its sizes within what is available."""
        limits = self.score_range
        ordered = len(limits) == 2 and all(map(is_number, limits)) and limits[0] < limits[1]
        check("score_range", limits, ordered, "must be the lowest and the highest possible score")
        low = self.range[0]
        pilot_points("student_scores", self.student_scores, self.range)
        pilot_points("teacher_scores", self.teacher_scores, self.range)
        check("teacher_scores", self.teacher_scores, len(self.teacher_scores) > 0, "must have a score")
        check(
            "distilled_scores", self.distilled_scores, isinstance(self.distilled_scores, Mapping), "must be a mapping"
        )
        for labels, scores in self.distilled_scores.items():
            pilot_points(f"distilled_scores[{labels}]", scores, self.range)
            known = labels in self.teacher_scores
            check("teacher_scores", self.teacher_scores, known, f"must have the teacher's score at {labels} labels")
        for labels, value in self.teacher_scores.items():
            score = mean_score(value)
            check(f"teacher_scores[{labels}]", value, score > low, f"must be above the lowest score ({low:g})")
        pilot = max([*self.student_scores, *self.teacher_scores], default=0)
        rule = f"must be at least the pilot's largest size ({pilot})"
        check("labels_available", self.labels_available, self.labels_available >= pilot, rule)

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest possible score."""
        return float(self.score_range[0]), float(self.score_range[1])

    @property
    def money(self) -> float:
        """What is left of the budget after the pilot."""
        return self.budget - self.pilot_cost

    @classmethod
    def read(cls, path: "str | Path", changes: Sequence[str] = ()) -> "AnnotationInputs":
        """Read the inputs from a YAML file with the arguments' names as keys.

        Args:
            path: the file.
            changes: each `key=value`, in place of the file's.

        Raises:
            ValueError: the file cannot be read, or a key or a value is invalid.
        """
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), RecipeLoader)
        except OSError as error:
            raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"'{path}' is not YAML: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"'{path}' must be a mapping of keys, not {type(values).__name__}.")
        return cls.from_dict(values | dict(split_override(change) for change in changes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AnnotationInputs":
        """Inputs from a mapping.

        Raises:
            ValueError: a key is unknown or missing, or a value is invalid.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                hint = did_you_mean(name, names) or "."
                raise ValueError(f"`{name}` is not an input of this plan{hint}")
        required = [field.name for field in fields(cls) if field.default is field.default_factory]
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise ValueError(f"`{missing[0]}` is missing; a plan needs {', '.join(required)}.")
        return cls(**values)


def mean_score(score: "float | Sequence[float]") -> float:
    """The mean over seeds."""
    return float(score) if isinstance(score, int | float) else sum(score) / len(score)
