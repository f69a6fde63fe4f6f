"""The rows of the `data` section: where they lie, which are for training, and whether their columns are there."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from ..placement import check, check_count
from .draft import RecipeError, did_you_mean, optional

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class Rows(ABC):
    """Where the data are; `path`, `name`, `data_files` and `revision` are those of `datasets.load_dataset`.

    Args:
        path: an id on the Hub, or a folder; left out where `data_files` says it all.
        name: the configuration of a dataset on the Hub.
        data_files: local CSV, JSON, JSON-lines, Parquet or text files, relative to the working directory; one, a list,
            or a mapping of splits to them.
        revision: branch, tag or commit on the Hub.
        train_split: what is trained on.
        eval_split: what is evaluated on; None for nothing.
        split_column: a column that names each row's split, for data that come as one table.
        max_train_samples: so many rows are drawn for training, by `training.seed`; None for all.
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
        check("path", self.path, bool(self.path or self.data_files), "must be given, or else `data_files`")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        files = list(_files(self.data_files))
        for file in files:
            there = self.path or "://" in file or glob(file, recursive=True)
            check("data_files", file, bool(there), f"must be there; the working directory is {Path.cwd()}")
        if self.path is None:
            kinds = {BUILDERS.get(Path(file).suffix) for file in files}
            rule = f"must be files of one kind ({', '.join(BUILDERS)}), or `path` must name it"
            check("data_files", self.data_files, len(kinds) == 1 and None not in kinds, rule)

    @abstractmethod
    def columns(self) -> list[str]:
        """The columns that are read."""

    @abstractmethod
    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        """The rows as a trainer takes them."""

    def labels(self, rows: Any) -> list[str]:
        """The names of the classes, in the order of their indices; none where nothing is classified."""
        return []

    def load(self, seed: int) -> tuple[Any, Any, list[str]]:
        """The rows to train on, those to evaluate on (None without `eval_split`), and the classes there are in all.

        Raises:
            RecipeError: there are no such data, splits or columns, or a cell is empty.
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
        part = "train" if self.split_column else split  # a single table is read as "train"
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
                known = ", ".join(sorted(set(names))[:10])
                raise RecipeError(
                    f"`data.{key}` (={split!r}) must stand in the column `{self.split_column}`: {known}."
                )
            chosen = rows.select([i for i, name in enumerate(names) if name == split]).flatten_indices()
            rows = datasets.Dataset(chosen.data, chosen.info, datasets.NamedSplit(split))
        if self.path is None:
            rows.info.dataset_name = self.title  # else that of the reader: "csv"
        return rows

    @property
    def title(self) -> str:
        """What the data are called."""
        return self.path or Path(next(_files(self.data_files))).stem

    def _check_columns(self, rows: Any, columns: list[str]) -> None:
        for column in columns:
            if column not in rows.column_names:
                known = f"{', '.join(rows.column_names)}{did_you_mean(column, rows.column_names)}"
                raise RecipeError(f"`data`: {self.title} has no column `{column}`, but {known}")
            empty = next((i for i, value in enumerate(rows[column]) if value is None), None)
            if empty is not None:
                raise RecipeError(f"`data`: row {empty} of the column {column!r} of {self.title} is empty.")

    @staticmethod
    def _draw(rows: Any, n: int | None, seed: int) -> Any:
        return rows if n is None or n >= len(rows) else rows.shuffle(seed=seed).select(range(n))


def _files(data_files: Any) -> Iterator[str]:
    """The files, given as one, as a list, or as a mapping of splits to them."""
    if isinstance(data_files, str):
        yield data_files
    else:
        for value in data_files.values() if isinstance(data_files, dict) else data_files or ():
            yield from _files(value)
