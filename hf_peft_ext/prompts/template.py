"""A prompt template turns a row of data into a prompt, its answer choices, and the index of the right choice."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn

from hf_peft_ext.prompts.sandbox import parse, render
from hf_peft_ext.ranking.metrics import CLASSIFICATION
from hf_peft_ext.validation.checks import check

SEPARATOR = "|||"


@dataclass(frozen=True)
class PromptTemplate:
    """A template of a prompt and its answer choices.

        template = PromptTemplate("plain", "{{ text }} This is", choices=["bad", "good"])
        template.render({"text": "I liked it.", "label": 1})
        # {"prompt": "I liked it. This is", "choices": ["bad", "good"], "answer": 1}

    Prompt and choices are written in the restricted Jinja of `sandbox`, whose variables are the fields of the row. It
    runs no code, so untrusted templates can be used.

    Args:
        name: of the template.
        prompt: Jinja. White space at both ends is kept.
        choices: a list with one Jinja text for each choice; or a single text that renders to all choices, separated by
            "|||" and white space.
        answer: the field with the right choice, as its index or its text.
        metric: of the task: "accuracy", "f1" or "matthews_correlation".

    Raises:
        TypeError: a value is not text.
        ValueError: a text is not valid Jinja, is too long, or uses a part of Jinja that is not allowed; there are no
            choices; or the metric is unknown. The message names the template and the field.
    """

    name: str
    prompt: str
    choices: str | Sequence[str]
    answer: str = "label"
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        for field in ("name", "prompt", "answer"):
            self.check_text(field, getattr(self, field))
        check("name", self.name, bool(self.name), "must not be empty")
        if not isinstance(self.choices, str):
            if not isinstance(self.choices, Sequence):
                raise TypeError(f"`choices` of template {self.name!r} must be a text, or a list of texts.")
            object.__setattr__(self, "choices", tuple(self.choices))
        if not self.choices:
            self.refuse("choices", "must hold at least one choice")
        for text in self.choice_texts:
            self.check_text("choices", text)
        rule = f"of template {self.name!r} must be one of {', '.join(CLASSIFICATION)}"
        check("metric", self.metric, self.metric in CLASSIFICATION, rule)
        for field, text in (("prompt", self.prompt), *(("choices", text) for text in self.choice_texts)):
            try:
                parse(text)
            except ValueError as error:
                self.refuse(field, str(error), error)

    @property
    def choice_texts(self) -> tuple[str, ...]:
        """The Jinja texts of the choices."""
        return (self.choices,) if isinstance(self.choices, str) else tuple(self.choices)

    @property
    def fields(self) -> set[str]:
        """The fields of a row that prompt and choices read."""
        return {field for text in (self.prompt, *self.choice_texts) for field in parse(text)[1]}

    def render(self, row: Mapping[str, Any], answered: bool = True) -> dict[str, Any]:
        """Render a row to `prompt` (text), `choices` (texts) and `answer` (index of the right choice).

        Args:
            row: field -> value.
            answered: False omits the answer, for unlabelled rows.

        Raises:
            ValueError: a field is missing or is neither text nor number; a choice is empty; the answer is not among
                the choices; or a limit of `sandbox` is exceeded.
        """
        rendered = {"prompt": self.text("prompt", self.prompt, row), "choices": self.rendered_choices(row)}
        return rendered | ({"answer": self.index(row, rendered["choices"])} if answered else {})

    def rendered_choices(self, row: Mapping[str, Any]) -> list[str]:
        """The choices of a row.

        Raises:
            ValueError: see `render`.
        """
        choices = [self.text("choices", text, row) for text in self.choice_texts]
        if isinstance(self.choices, str):
            fields = parse(self.choices)[1]
            if any(SEPARATOR in text for field in fields for text in texts_in(row.get(field))):
                self.refuse("choices", f"cannot be separated: a text of the row holds {SEPARATOR!r}; pass a list")
            choices = [choice.strip() for choice in choices[0].split(SEPARATOR)]
        if not all(choices):
            self.refuse("choices", f"must not be empty, as one of {choices!r} is")
        return choices

    def index(self, row: Mapping[str, Any], choices: list[str]) -> int:
        """The index of the right choice.

        Raises:
            ValueError: the row lacks the answer, or the answer is not among the choices.
        """
        if self.answer not in row:
            fields = ", ".join(map(str, row)) or "none"
            self.refuse("answer", f"is the field {self.answer!r}, which the row does not have; it has {fields}")
        answer = row[self.answer]
        if isinstance(answer, str) and answer in choices:
            return choices.index(answer)
        if isinstance(answer, Integral) and 0 <= int(answer) < len(choices):
            return int(answer)
        rule = f"must be one of the choices {choices!r} or its index, not {answer!r}"
        self.refuse("answer", rule)

    def text(self, field: str, source: str, row: Mapping[str, Any]) -> str:
        """Render a Jinja text of this template; errors name the template and the field.

        Raises:
            ValueError: see `sandbox.render`.
        """
        try:
            return render(source, row)
        except ValueError as error:
            self.refuse(field, str(error), error)

    def check_text(self, field: str, value: object) -> None:
        """Refuse values that are not text.

        Raises:
            TypeError: the value is not text.
        """
        if not isinstance(value, str):
            raise TypeError(f"`{field}` of template {self.name!r} must be a text, not {type(value).__name__}.")

    def refuse(self, field: str, rule: str, cause: Exception | None = None) -> NoReturn:
        """Raise a ValueError that names the template and the field."""
        raise ValueError(f"`{field}` of template {self.name!r} {rule}.") from cause


def texts_in(value: Any) -> Iterator[str]:
    """The texts in a field, nested ones included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for part in value.values() for text in texts_in(part))
    elif isinstance(value, Sequence):
        yield from (text for part in value for text in texts_in(part))
