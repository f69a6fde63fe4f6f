"""The `data` section: where the examples lie, which columns hold what, and how they become a model's inputs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..placement import check, check_count
from .draft import RecipeError

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class DataArguments:
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
            found = "://" in file or bool(self.path) or any(Path().glob(file)) if not Path(file).is_absolute() else Path(file).exists()
            check("data_files", file, found, f"must lie in the working directory, {Path.cwd()}, or be a full path")
        if self.path is None:
            kinds = {BUILDERS.get(Path(file).suffix) for file in files}
            rule = f"must be files of one kind, with one of the endings {', '.join(BUILDERS)}; or name it as `path`"
            check("data_files", self.data_files, len(kinds) == 1 and None not in kinds, rule)

    def columns(self) -> list[str]:
        """The columns that are read."""
        raise NotImplementedError

    def labels(self, rows: Any) -> list[str]:
        """The names of the classes, in the order of their indices; none where nothing is classified."""
        return []

    def load(self, seed: int) -> tuple[Any, Any]:
        """The rows to train on and those to evaluate on (None without `eval_split`), with every column.

        Raises:
            RecipeError: there are no such data, splits or columns, or a cell is empty.
        """
        train = self._draw(self._split(self.train_split, "train_split"), self.max_train_samples, seed)
        if self.eval_split is None:
            return train, None
        return train, self._draw(self._split(self.eval_split, "eval_split"), self.max_eval_samples, seed)

    def _split(self, split: str, key: str) -> Any:
        from datasets import load_dataset

        path = self.path or BUILDERS[Path(next(_files(self.data_files))).suffix]
        options: dict[str, Any] = {"delimiter": "\t"} if path == "csv" and str(self.data_files).endswith(".tsv") else {}
        try:
            rows = load_dataset(
                path, self.name, data_files=self.data_files, revision=self.revision,
                split="train" if self.split_column else split, **options,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise RecipeError(f"`data.{key}` (={split!r}) of {self.title} cannot be loaded: {error}") from error
        if self.split_column:
            self._check_columns(rows, [self.split_column])
            column = rows[self.split_column]
            names = sorted({str(value) for value in column})
            rule = f"must stand in the column {self.split_column!r}, which holds {', '.join(names[:10])}"
            check(f"data.{key}", split, split in names, rule)
            rows = rows.select([i for i, value in enumerate(column) if str(value) == split])
        self._check_columns(rows, self.columns())
        return rows

    @property
    def title(self) -> str:
        """What the data are called."""
        return self.path or Path(next(_files(self.data_files))).stem

    def _check_columns(self, rows: Any, columns: list[str]) -> None:
        for column in columns:
            if column not in rows.column_names:
                raise RecipeError(
                    f"`data`: {self.title} has no column {column!r}; its columns are {', '.join(rows.column_names)}."
                )
            empty = next((i for i, value in enumerate(rows[column]) if value is None), None)
            if empty is not None:
                raise RecipeError(f"`data`: row {empty} of the column {column!r} of {self.title} is empty.")

    @staticmethod
    def _draw(rows: Any, n: int | None, seed: int) -> Any:
        return rows if n is None or n >= len(rows) else rows.shuffle(seed=seed).select(range(n))


@dataclass
class Classification(DataArguments):
    """Data of SEQ_CLS.

    Args:
        text_column: the text, or a list of two columns for pairs of texts.
        label_column: the class: words, whole numbers, or a ClassLabel of `datasets`.
        max_length: tokens after which a text is cut; None for what the model takes.
    """

    text_column: str | list[str] = "text"
    label_column: str = "label"
    max_length: int | None = None

    def texts(self) -> list[str]:
        return [self.text_column] if isinstance(self.text_column, str) else list(self.text_column)

    def columns(self) -> list[str]:
        return [*self.texts(), self.label_column]

    def load(self, seed: int) -> tuple[Any, Any]:
        train, evaluated = super().load(seed)
        if evaluated is not None:
            names = self.labels(train)
            strange = sorted(set(self._names(evaluated)) - set(names))
            rule = f"has classes that the training rows have not: {', '.join(strange[:5])}"
            check("data.eval_split", self.eval_split, not strange, rule)
        return train, evaluated

    def labels(self, rows: Any) -> list[str]:
        """The names of the classes, in the order of their indices."""
        feature = rows.features[self.label_column]
        if hasattr(feature, "names"):
            return list(feature.names)
        kinds = {type(label) for label in rows[self.label_column]}
        rule = "must hold words or whole numbers, as classes"
        check("data.label_column", self.label_column, kinds <= {str, int, bool}, rule)
        return [str(label) for label in sorted(set(rows[self.label_column]))]

    def _names(self, rows: Any) -> list[str]:
        feature = rows.features[self.label_column]
        return [feature.names[i] if hasattr(feature, "names") else str(i) for i in rows[self.label_column]]

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        def inputs(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [batch[column] for column in self.texts()]
            return dict(tokenizer(*texts, truncation=True, max_length=self.max_length))

        index = {label: i for i, label in enumerate(labels)}
        encoded = rows.map(inputs, batched=True, remove_columns=rows.column_names)
        return encoded.add_column("labels", [index[name] for name in self._names(rows)])


@dataclass
class Instruction(DataArguments):
    """Data of CAUSAL_LM, for TRL's SFTTrainer: plain text, a prompt and its response, or chats. One of the three.

    Args:
        text_column: plain text.
        prompt_column: what is asked; the loss leaves it out.
        response_column: what is to be answered.
        messages_column: chats, as lists of {"role": ..., "content": ...}; needs a chat template.
    """

    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {key for key in ("text", "prompt", "response", "messages") if getattr(self, f"{key}_column")}
        rule = "must stand alone: `text_column`, or `messages_column`, or `prompt_column` with `response_column`"
        check("columns", sorted(given), given in ({"text"}, {"messages"}, {"prompt", "response"}), rule)

    def named(self) -> dict[str, str]:
        """Column -> what TRL calls it."""
        columns = {self.text_column: "text", self.messages_column: "messages", self.prompt_column: "prompt", self.response_column: "completion"}  # fmt: skip
        return {column: name for column, name in columns.items() if column}

    def columns(self) -> list[str]:
        return list(self.named())

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        named = self.named()
        return rows.select_columns(list(named)).rename_columns({old: new for old, new in named.items() if old != new})


@dataclass
class Sequences(DataArguments):
    """Data of SEQ_2_SEQ_LM.

    Args:
        prompt_column: what the encoder reads.
        response_column: what the decoder is to write.
        max_length: tokens after which a prompt is cut; None for what the model takes.
        max_target_length: the same for a response.
    """

    prompt_column: str = "prompt"
    response_column: str = "response"
    max_length: int | None = None
    max_target_length: int | None = None

    def columns(self) -> list[str]:
        return [self.prompt_column, self.response_column]

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        def inputs(batch: dict[str, list[str]]) -> dict[str, Any]:
            prompts = tokenizer(batch[self.prompt_column], truncation=True, max_length=self.max_length)
            responses = tokenizer(
                text_target=batch[self.response_column], truncation=True, max_length=self.max_target_length
            )
            return {**prompts, "labels": responses["input_ids"]}

        return rows.map(inputs, batched=True, remove_columns=rows.column_names)


def _files(data_files: Any) -> Iterator[str]:
    """The files, however they are given."""
    if isinstance(data_files, str):
        yield data_files
    for value in data_files.values() if isinstance(data_files, dict) else data_files or []:
        if not isinstance(data_files, str):
            yield from _files(value)
