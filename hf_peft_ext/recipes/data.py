"""The data of each task: the columns it reads, and how they become a model's inputs."""

import math
from dataclasses import dataclass
from typing import Any

from hf_peft_ext.prompts import PromptTemplate, chat
from hf_peft_ext.recipes.dataset_config import DatasetArguments
from hf_peft_ext.recipes.recipe_source import RecipeError
from hf_peft_ext.validation.checks import check

PROBLEM_TYPES = ("single_label_classification", "regression")


@dataclass
class ClassificationData(DatasetArguments):
    """Data of SEQ_CLS.

    Args:
        text_column: column of the text, or a list of two columns for pairs of texts.
        label_column: column of the class: strings, whole numbers, or a ClassLabel of `datasets`; for regression
            numbers.
        problem_type: "single_label_classification" or "regression", as in a transformers config.
        max_length: longer texts are cut to so many tokens; None for the model's own limit.
    """

    text_column: str | list[str] = "text"
    label_column: str = "label"
    problem_type: str = "single_label_classification"
    max_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = f"must be {' or '.join(PROBLEM_TYPES)}"
        check("problem_type", self.problem_type, self.problem_type in PROBLEM_TYPES, rule)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to predict."""
        return self.problem_type == "regression"

    def texts(self) -> list[str]:
        """The text columns."""
        return [self.text_column] if isinstance(self.text_column, str) else list(self.text_column)

    def columns(self) -> list[str]:
        """The columns that are read."""
        return [*self.texts(), self.label_column]

    def labels(self, rows: Any) -> list[str]:
        """The names of the classes, in the order of their indices; for regression the column's name.

        Raises:
            RecipeError: the labels are neither strings nor whole numbers; for regression, not finite numbers.
        """
        if self.is_regression:
            return [self.label_column]
        feature = rows.features[self.label_column]
        if hasattr(feature, "names"):
            return list(feature.names)
        if not {type(label) for label in rows[self.label_column]} <= {str, int, bool}:
            rule = "must hold strings or whole numbers; for numbers to predict, set `data.problem_type=regression`"
            raise RecipeError(f"`data.label_column` (={self.label_column!r}) {rule}.")
        return [str(label) for label in sorted(set(rows[self.label_column]))]

    def _names(self, rows: Any) -> list[str]:
        feature = rows.features[self.label_column]
        return [feature.names[i] if hasattr(feature, "names") else str(i) for i in rows[self.label_column]]

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        """Tokens of the texts, and as `labels` indices of the classes, or the numbers of a regression.

        Raises:
            RecipeError: a row has a class that is not in `labels`, or no finite number.
        """

        def inputs(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [batch[column] for column in self.texts()]
            return dict(tokenizer(*texts, truncation=True, max_length=self.max_length))

        targets = self._numbers(rows) if self.is_regression else self._indices(rows, labels)
        encoded = rows.map(inputs, batched=True, remove_columns=rows.column_names)
        return encoded.add_column("labels", targets)

    def _indices(self, rows: Any, labels: list[str]) -> list[int]:
        index = {label: i for i, label in enumerate(labels)}
        names = self._names(rows)
        unknown = sorted(set(names) - set(labels))
        if unknown:
            rule = f"has classes that no training row has: {', '.join(unknown[:5])}"
            raise RecipeError(f"`data.eval_split` (={self.eval_split!r}) {rule}.")
        return [index[name] for name in names]

    def _numbers(self, rows: Any) -> list[float]:
        values = rows[self.label_column]
        for i, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                rule = f"must hold finite numbers for regression; row {i} has {value!r}"
                raise RecipeError(f"`data.label_column` (={self.label_column!r}) {rule}.")
        return [float(value) for value in values]


@dataclass
class InstructionData(DatasetArguments):
    """Data of CAUSAL_LM, for TRL's SFTTrainer: plain text, or prompts with responses, or chats.

    Args:
        text_column: column of plain text.
        prompt_column: column of prompts, which the loss leaves out.
        response_column: column of responses.
        messages_column: column of chats: lists of {"role": ..., "content": ...}; needs a chat template.
    """

    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {key for key in ("text", "prompt", "response", "messages") if getattr(self, f"{key}_column")}
        rule = "must be one of: `text_column`; `messages_column`; `prompt_column` with `response_column`"
        check("columns", sorted(kinds), kinds in ({"text"}, {"messages"}, {"prompt", "response"}), rule)

    def trl_names(self) -> dict[str, str]:
        """Column -> its name in TRL."""
        columns = (self.text_column, self.messages_column, self.prompt_column, self.response_column)
        names = ("text", "messages", "prompt", "completion")
        return {column: name for column, name in zip(columns, names, strict=True) if column}

    def columns(self) -> list[str]:
        """The columns that are read."""
        return list(self.trl_names())

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        """The columns under TRL's names; TRL makes tokens of them."""
        names = self.trl_names()
        return rows.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})


@dataclass
class SequenceData(DatasetArguments):
    """Data of SEQ_2_SEQ_LM.

    Args:
        prompt_column: column of the encoder's texts.
        response_column: column of the decoder's texts.
        max_length: longer prompts are cut to so many tokens; None for the model's own limit.
        max_target_length: the same for responses.
    """

    prompt_column: str = "prompt"
    response_column: str = "response"
    max_length: int | None = None
    max_target_length: int | None = None

    def columns(self) -> list[str]:
        """The columns that are read."""
        return [self.prompt_column, self.response_column]

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        """Tokens of the prompts, and tokens of the responses as `labels`."""

        def inputs(batch: dict[str, list[str]]) -> dict[str, Any]:
            prompts = tokenizer(batch[self.prompt_column], truncation=True, max_length=self.max_length)
            responses = tokenizer(
                text_target=batch[self.response_column], truncation=True, max_length=self.max_target_length
            )
            return {**prompts, "labels": responses["input_ids"]}

        return rows.map(inputs, batched=True, remove_columns=rows.column_names)


@dataclass
class RankingData(DatasetArguments):
    """Data of T-Few, for CAUSAL_LM and SEQ_2_SEQ_LM: a prompt for each row, and answer choices.

    Args:
        prompt: a Jinja template of the prompt; its names are columns.
        choices: a list of Jinja templates; one template that renders to all choices, separated by "|||"; or a mapping
            from the values of `answer_column` to their choices.
        answer_column: column of the right choice: its text, its index, or a key of `choices`.
        use_chat_template: whether to apply the tokenizer's chat template to prompts.
    """

    prompt: str = ""
    choices: list[str] | dict[str | int, str] | str = ""
    answer_column: str = "label"
    use_chat_template: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            "prompt", self.prompt, bool(self.prompt.strip()), "must be a Jinja template, such as '{{ text }} Topic:'"
        )
        self.template()

    def template(self) -> PromptTemplate:
        """The template of prompt and choices.

        Raises:
            ValueError: it is not a valid template.
        """
        choices = list(self.choices.values()) if isinstance(self.choices, dict) else self.choices
        return PromptTemplate("data", self.prompt, choices, self.answer_column)

    def columns(self) -> list[str]:
        """The columns that are read."""
        return sorted(self.template().fields | {self.answer_column})

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        """The prompt, the choices and the index of the right choice, for T-Few's trainer.

        Raises:
            RecipeError: a row cannot be rendered.
        """
        template = self.template()

        def rendered(row: dict[str, Any], number: int) -> dict[str, Any]:
            try:
                example = template.render({**row, self.answer_column: self._answer(row)})
                return {**example, "prompt": chat(tokenizer, example["prompt"])} if self.use_chat_template else example
            except ValueError as error:
                raise RecipeError(f"`data`: row {number} of {self.title}: {error}") from error

        return rows.map(rendered, with_indices=True, remove_columns=rows.column_names)

    def _answer(self, row: dict[str, Any]) -> Any:
        """The right choice, as the template expects it."""
        answer = row[self.answer_column]
        if not isinstance(self.choices, dict):
            return answer
        keys = [str(key) for key in self.choices]
        check(self.answer_column, answer, str(answer) in keys, f"must be one of {', '.join(keys)}")
        return keys.index(str(answer))
