"""A recipe as a task to measure: its score after training d numbers, or all parameters."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_peft_ext.compare.methods import method_named
from hf_peft_ext.compare.rows import ComparedRows
from hf_peft_ext.compare.run_recipe import read_score, run_recipe, score_name
from hf_peft_ext.compare.runs import prepare_quietly, train_base
from hf_peft_ext.intrinsic_dimension.settings import MeasureArguments
from hf_peft_ext.recipes.recipe import Recipe
from hf_peft_ext.recipes.recipe_source import RecipeError
from hf_peft_ext.tuners.intrinsic.config import IntrinsicConfig
from hf_peft_ext.tuners.learning_rates import recommended_learning_rate
from hf_peft_ext.validation.checks import check


@dataclass
class MeasuredRecipe:
    """Trains the model of a recipe.

    The fields of the recipe's `peft` section count if its type is INTRINSIC. Full fine-tuning trains all parameters.

    Args:
        recipe: the recipe.
        rows: training and dev rows.
        dev_split: the split of the dev rows, or None.
    """

    recipe: Recipe
    rows: ComparedRows
    dev_split: str | None

    @classmethod
    def load(cls, recipe: Recipe, args: MeasureArguments) -> "MeasuredRecipe":
        """Check everything, and load the rows.

        Raises:
            ValueError: the model is quantized, the score is a loss, or there are no dev rows.
        """
        if recipe.quantization is not None:
            raise RecipeError("`quantization` must be left out: all parameters of the model are changed.")
        rule = "has a loss as its score, which has no 90 %; name one of `metrics`, or a task with labels"
        check("recipe", recipe.data.title, score_name(recipe) != "loss", rule)
        task = cls(recipe, ComparedRows.load(recipe, args.dev_split, args.dev_share), args.dev_split)
        for d in (None, args.smallest, args.largest):  # their errors now, not in each run
            task.run_recipe(d, 0, 1.0, args.folder)
        return task

    @property
    def score(self) -> str:
        """Name of the score."""
        return score_name(self.recipe)

    def settings(self) -> dict[str, Any]:
        """The settings that the result shows, and that all workers share."""
        columns = [self.rows.train, *([self.rows.dev] if self.rows.dev is not None else [])]
        content = repr([[list(part[column]) for column in self.recipe.data.columns()] for part in columns])
        written = {name: dict(section) for name, section in self.recipe.written.items() if isinstance(section, dict)}
        written["training"].pop("output_dir")
        return {"recipe": written, "rows": hashlib.sha256(content.encode()).hexdigest()[:12]}

    def run_recipe(self, d: int | None, seed: int, rate: float, folder: Path) -> Recipe:
        """The recipe of a run.

        Args:
            d: number of trained numbers; None for all parameters.
            seed: of the run and of its projection.
            rate: factor on the usual learning rate.
            folder: for the trainer.
        """
        method = method_named("full" if d is None else "intrinsic", self.recipe.written["peft"])
        config, learning_rate = dict(method.config), method.learning_rate
        if d is not None:
            config |= {"d": d, "seed": seed}
            fields = {key: value for key, value in config.items() if key != "peft_type"}
            learning_rate = recommended_learning_rate(IntrinsicConfig(**fields))
        return run_recipe(self.recipe, config, rate * learning_rate, seed, folder, self.dev_split)

    def __call__(self, d: int | None, seed: int, rate: float) -> float:
        """Train with d numbers, or all parameters, and return the score on the dev rows."""
        seed += self.recipe.training.seed
        with TemporaryDirectory() as folder:
            trainer = prepare_quietly(self.run_recipe(d, seed, rate, Path(folder)), self.rows.of(seed))
            if d is None:
                train_base(trainer.model)
            trainer.train()
            return read_score(trainer.evaluate(), self.score)
