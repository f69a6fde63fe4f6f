"""The recipe of each run of a comparison: the user's recipe with another adapter, learning rate and seed."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_peft_ext.ranking.metrics import CLASSIFICATION, REGRESSION
from hf_peft_ext.recipes.recipe import Recipe

QUIET = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
}
# Keys of `training` that need evaluations on the recipe's `eval_split`.
OF_EVALUATION = ("metric_for_best_model", "greater_is_better", "eval_steps", "eval_delay", "eval_on_start")


def score_name(recipe: Recipe) -> str:
    """The score: the recipe's first metric.

    Without one it is the accuracy, Pearson's correlation for regression, and the held-out loss for generation.
    """
    if recipe.task.metrics is CLASSIFICATION:
        return next(iter(recipe.metrics), "accuracy")
    if recipe.task.metrics is REGRESSION:
        return next(iter(recipe.metrics), "pearson")
    return "loss"


def read_score(metrics: Mapping[str, float], name: str) -> float:
    """The score of an evaluation, negated if it is a loss: higher is better.

    Raises:
        ValueError: it is not a finite number.
    """
    value = float(metrics[f"eval_{name}"])
    if not math.isfinite(value):
        raise ValueError(f"The score on the dev rows, {name}, is {value}.")
    return -value if name == "loss" else value


def run_recipe(
    recipe: Recipe, peft: Mapping[str, Any], learning_rate: float, seed: int, folder: Path, dev_split: str | None
) -> Recipe:
    """The recipe of a run, which evaluates only when it is asked to.

    Args:
        recipe: the user's recipe.
        peft: the `peft` section, without `task_type`.
        learning_rate: of the run.
        seed: of the run.
        folder: a temporary folder, for the trainer.
        dev_split: the split that the card of the run would name.
    """
    name = score_name(recipe)
    training = {**recipe.written["training"], **QUIET}
    training |= {"output_dir": str(folder), "learning_rate": learning_rate, "seed": seed}
    if "predict_with_generate" in training:
        training["predict_with_generate"] = False  # the score is a loss
    data = {**recipe.written["data"], "eval_split": dev_split or recipe.data.train_split}
    return changed(recipe, peft, training, data, [] if name == "loss" else [name])


def winner_recipe(recipe: Recipe, peft: Mapping[str, Any], learning_rate: float, folder: Path, test: bool) -> Recipe:
    """The recipe of the winner: trained on all training rows, and evaluated once, on the test rows.

    Args:
        recipe, peft, learning_rate: as in `run_recipe`.
        folder: the folder of the adapter.
        test: whether the recipe's `eval_split` holds test rows.
    """
    training = {**recipe.written["training"], **QUIET, "output_dir": str(folder), "learning_rate": learning_rate}
    training |= {"logging_strategy": recipe.written["training"].get("logging_strategy", "steps")}
    data = {**recipe.written["data"], "eval_split": recipe.data.eval_split if test else None}
    metrics = recipe.written.get("metrics") or []
    name = score_name(recipe)
    if test and name != "loss" and name not in metrics:
        metrics = [name, *metrics]
    return changed(recipe, peft, training, data, metrics if test else [])


def changed(
    recipe: Recipe, peft: Mapping[str, Any], training: dict[str, Any], data: dict[str, Any], metrics: list[str]
) -> Recipe:
    """The recipe with these sections. Keys about evaluations during training are dropped."""
    kept = {key: value for key, value in training.items() if key not in OF_EVALUATION}
    task_type = recipe.written["peft"]["task_type"]
    return recipe.with_sections(
        peft={**peft, "task_type": task_type},
        training=kept,
        data={key: value for key, value in data.items() if value is not None},
        metrics=metrics,
    )
