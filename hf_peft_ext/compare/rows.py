"""The rows of a comparison: those to train on, and dev rows to choose by. Test rows are not read here."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from hf_peft_ext.recipes.data import ClassificationData
from hf_peft_ext.recipes.recipe import Recipe
from hf_peft_ext.validation.checks import check

RowsAndLabels = tuple[Any, Any, list[str]]  # rows to train on, rows to evaluate on, names of the classes


@dataclass
class ComparedRows:
    """Training and dev rows of each seed.

    Args:
        train: the rows of the recipe's `train_split`.
        dev: the rows of `dev_split`; None to hold out rows of `train`.
        labels: names of the classes.
        label_column: column by whose values held-out rows are balanced, or None.
        share: share of the rows to hold out.
    """

    train: Any
    dev: Any
    labels: list[str]
    label_column: str | None
    share: float

    @classmethod
    def load(cls, recipe: Recipe, dev_split: str | None, dev_share: float) -> "ComparedRows":
        """Load the rows of training, and those of `dev_split`.

        Args:
            recipe: the recipe.
            dev_split: the split of dev rows; None to hold out training rows.
            dev_share: the share of the training rows to hold out.

        Raises:
            ValueError: a split does not exist, the dev split is the training split, or no rows are left to hold out.
        """
        data, seed = replace(recipe.data, eval_split=None), recipe.training.seed
        train, _, labels = data.load(seed)
        rule = f"must differ from `data.train_split` (={data.train_split!r}), or be left out to hold out training rows"
        check("dev_split", dev_split, dev_split != data.train_split, rule)
        dev = None
        if dev_split is not None:
            limit = data.max_eval_samples
            dev = replace(data, train_split=dev_split, max_train_samples=limit).load(seed)[0]
        held = round(dev_share * len(train))
        rule = f"must leave rows to train on and dev rows to choose by; of {len(train)} rows it holds out {held}"
        check("dev_share", dev_share, dev is not None or 1 < held < len(train) - 1, rule)
        column = data.label_column if isinstance(data, ClassificationData) and not data.is_regression else None
        return cls(train, dev, labels, column, dev_share)

    def of(self, seed: int) -> RowsAndLabels:
        """The training and dev rows of a seed. Held-out rows have the shares of the classes of all rows."""
        if self.dev is not None:
            return self.train, self.dev, self.labels
        from sklearn.model_selection import train_test_split  # slow to import

        held, classes = round(self.share * len(self.train)), None
        if self.label_column is not None:
            classes = list(self.train[self.label_column])
            counts = Counter(classes)
            if min(counts.values()) < 2 or not len(counts) <= held <= len(self.train) - len(counts):
                classes = None  # too few rows for one of each class on both sides
        train, dev = train_test_split(range(len(self.train)), test_size=held, random_state=seed, stratify=classes)
        return self.train.select(sorted(train)), self.train.select(sorted(dev)), self.labels
