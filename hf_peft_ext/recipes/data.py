"""What each task reads: which columns of the rows hold what, and how they become a model's inputs."""

from dataclasses import dataclass
from typing import Any

from hf_peft_ext.prompts import PromptTemplate, chat
from hf_peft_ext.recipes.dataset_config import Rows
from hf_peft_ext.recipes.recipe_source import RecipeError
from hf_peft_ext.validation.checks import check


@dataclass
class Classification(Rows):
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

    def labels(self, rows: Any) -> list[str]:
        """The names of the classes, in the order of their indices."""
        feature = rows.features[self.label_column]
        if hasattr(feature, "names"):
            return list(feature.names)
        kinds = {type(label) for label in rows[self.label_column]}
        if not kinds <= {str, int, bool}:
            raise RecipeError(f"`data.label_column` (={self.label_column!r}) must hold words or whole numbers.")
        return [str(label) for label in sorted(set(rows[self.label_column]))]

    def _names(self, rows: Any) -> list[str]:
        feature = rows.features[self.label_column]
        return [feature.names[i] if hasattr(feature, "names") else str(i) for i in rows[self.label_column]]

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        def inputs(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [batch[column] for column in self.texts()]
            return dict(tokenizer(*texts, truncation=True, max_length=self.max_length))

        index = {label: i for i, label in enumerate(labels)}
        names = self._names(rows)
        strange = sorted(set(names) - set(labels))
        if strange:
            rule = f"has classes that no row to train on has: {', '.join(strange[:5])}"
            raise RecipeError(f"`data.eval_split` (={self.eval_split!r}) {rule}.")
        encoded = rows.map(inputs, batched=True, remove_columns=rows.column_names)
        return encoded.add_column("labels", [index[name] for name in names])


@dataclass
class Instruction(Rows):
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
        given = (self.text_column, self.messages_column, self.prompt_column, self.response_column)
        return {old: new for old, new in zip(given, ("text", "messages", "prompt", "completion"), strict=True) if old}

    def columns(self) -> list[str]:
        return list(self.named())

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        named = self.named()
        return rows.select_columns(list(named)).rename_columns({old: new for old, new in named.items() if old != new})


@dataclass
class Sequences(Rows):
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


@dataclass
class Ranking(Rows):
    """Data of T-Few, for CAUSAL_LM and SEQ_2_SEQ_LM: a prompt for each row, and choices to answer it with.

    Args:
        prompt: the prompt in Jinja, whose names are columns.
        choices: a list of texts in Jinja; one text that renders to all of them with "|||" between; or a mapping from
            what may stand in `answer_column` to the choice that it means.
        answer_column: the right choice: its text, its index, or a key of `choices`.
        use_chat_template: whether prompts go through the tokenizer's chat template.
    """

    prompt: str = ""
    choices: list[str] | dict[str | int, str] | str = ""
    answer_column: str = "label"
    use_chat_template: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check("prompt", self.prompt, bool(self.prompt.strip()), "must be a text in Jinja, such as '{{ text }} Topic:'")
        self.template()

    def template(self) -> PromptTemplate:
        choices = list(self.choices.values()) if isinstance(self.choices, dict) else self.choices
        return PromptTemplate("data", self.prompt, choices, self.answer_column)

    def columns(self) -> list[str]:
        return sorted(self.template().fields | {self.answer_column})

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        template = self.template()

        def rendered(row: dict[str, Any], number: int) -> dict[str, Any]:
            try:
                example = template.render({**row, self.answer_column: self._answer(row)})
                return {**example, "prompt": chat(tokenizer, example["prompt"])} if self.use_chat_template else example
            except ValueError as error:
                raise RecipeError(f"`data`: row {number} of {self.title}: {error}") from error

        return rows.map(rendered, with_indices=True, remove_columns=rows.column_names)

    def _answer(self, row: dict[str, Any]) -> Any:
        """The right choice, as the template takes it."""
        answer = row[self.answer_column]
        if not isinstance(self.choices, dict):
            return answer
        keys = [str(key) for key in self.choices]
        check(self.answer_column, answer, str(answer) in keys, f"must be one of {', '.join(keys)}")
        return keys.index(str(answer))
