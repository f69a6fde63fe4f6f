"""The rows of the `data` section: their files, their splits, and a check of their columns."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from hf_peft_ext.recipes.recipe_source import RecipeError, optional
from hf_peft_ext.validation.checks import check, check_count
from hf_peft_ext.validation.suggestions import did_you_mean

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class DatasetArguments(ABC):
    """The rows; `path`, `name`, `data_files` and `revision` are arguments of `datasets.load_dataset`.

    Args:
        path: an id on the Hub, or a folder; not needed with `data_files`.
        name: the configuration of a dataset on the Hub.
        data_files: local CSV, JSON, JSON lines, Parquet or text files, relative to the working directory: one file, a
            list, or a mapping of splits to files.
        revision: branch, tag or commit on the Hub.
        train_split: the split to train on.
        eval_split: the split to evaluate on; None for no evaluation.
        split_column: a column with the name of each row's split, if the data are a single table.
        max_train_samples: number of rows drawn for training, by `training.seed`; None for all.
        max_eval_samples: the same for evaluation.

    Raises:
        ValueError: a value breaks a rule.
    """

    path: str | None = None
    name: str | None = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    revision: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    split_column: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    def __post_init__(self) -> None:
        check("path", self.path, bool(self.path or self.data_files), "must be set, or `data_files` must be")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        files = list(_files(self.data_files))
        for file in files:
            exists = self.path or "://" in file or glob(file, recursive=True)
            check("data_files", file, bool(exists), f"must exist; the working directory is {Path.cwd()}")
        if self.path is None:
            kinds = {BUILDERS.get(Path(file).suffix) for file in files}
            rule = f"must be files of one kind ({', '.join(BUILDERS)}); for other kinds set `path`"
            check("data_files", self.data_files, len(kinds) == 1 and None not in kinds, rule)

    @abstractmethod
    def columns(self) -> list[str]:
        """The columns that are read."""

    @abstractmethod
    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        """The rows as the task's trainer expects them.

        Args:
            rows: a `datasets.Dataset`.
            tokenizer: the model's tokenizer.
            labels: the names of the classes, from `labels`.
        """

    def labels(self, rows: Any) -> list[str]:
        """The names of the classes, in the order of their indices; empty unless the task is classification."""
        return []

    def load(self, seed: int) -> tuple[Any, Any, list[str]]:
        """Load the rows.

        Args:
            seed: draws `max_train_samples` and `max_eval_samples`.

        Returns:
            The rows to train on, the rows to evaluate on (None without `eval_split`), and the names of the classes.

        Raises:
            RecipeError: the data, a split or a column does not exist, or a cell is empty.
        """
        train = self._split(self.train_split, "train_split")
        evaluated = None if self.eval_split is None else self._split(self.eval_split, "eval_split")
        labels = self.labels(train)
        if evaluated is not None:
            evaluated = self._draw(evaluated, self.max_eval_samples, seed)
        return self._draw(train, self.max_train_samples, seed), evaluated, labels

    def _split(self, split: str, key: str) -> Any:
        datasets = optional("datasets", "train")
        builder = self.path or BUILDERS[Path(next(_files(self.data_files))).suffix]
        part = "train" if self.split_column else split  # `datasets` loads a single table as "train"
        try:
            rows = datasets.load_dataset(
                builder, self.name, data_files=self.data_files, revision=self.revision, split=part
            )
        except (OSError, ValueError) as error:
            raise RecipeError(f"`data.{key}` (={split!r}) of {self.title} cannot be loaded: {error}") from error
        if len(rows) == 0:
            raise RecipeError(f"`data.{key}` (={split!r}) of {self.title} must hold rows; it is empty.")
        self._check_columns(rows, [*([self.split_column] if self.split_column else []), *self.columns()])
        if self.split_column:
            names = [str(value) for value in rows[self.split_column]]
            if split not in names:
                splits = ", ".join(sorted(set(names))[:10])
                rule = f"must be a value of the column `{self.split_column}`: {splits}"
                raise RecipeError(f"`data.{key}` (={split!r}) {rule}.")
            chosen = rows.select([i for i, name in enumerate(names) if name == split]).flatten_indices()
            rows = datasets.Dataset(chosen.data, chosen.info, datasets.NamedSplit(split))
        if self.path is None:
            rows.info.dataset_name = self.title  # otherwise the builder's: "csv"
        return rows

    @property
    def title(self) -> str:
        """The name of the data."""
        return self.path or Path(next(_files(self.data_files))).stem

    def _check_columns(self, rows: Any, columns: list[str]) -> None:
        for column in columns:
            if column not in rows.column_names:
                hint = did_you_mean(column, rows.column_names) or "."
                names = ", ".join(rows.column_names)
                raise RecipeError(f"`data`: {self.title} has no column `{column}`; it has {names}{hint}")
            empty = next((i for i, value in enumerate(rows[column]) if value is None), None)
            if empty is not None:
                raise RecipeError(f"`data`: row {empty} of the column {column!r} of {self.title} is empty.")

    @staticmethod
    def _draw(rows: Any, n: int | None, seed: int) -> Any:
        return rows if n is None or n >= len(rows) else rows.shuffle(seed=seed).select(range(n))


def _files(data_files: Any) -> Iterator[str]:
    """The files of one file, a list of files, or a mapping of splits to files."""
    if isinstance(data_files, str):
        yield data_files
    else:
        for value in data_files.values() if isinstance(data_files, dict) else data_files or ():
            yield from _files(value)
