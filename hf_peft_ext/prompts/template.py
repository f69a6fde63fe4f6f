"""A prompt template turns a row of data into a prompt, the choices to answer it with, and the right one."""

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
    """How to ask a language model for the class of a row, and what it may answer.

        template = PromptTemplate("plain", "{{ text }} This is", choices=["bad", "good"])
        template.render({"text": "I liked it.", "label": 1})
        # {"prompt": "I liked it. This is", "choices": ["bad", "good"], "answer": 1}

    Prompt and choices are in the part of Jinja that `sandbox` lets through, whose names are the fields of the row.
    Nothing of it runs code, so templates of strangers can be tried.

    Args:
        name: of the template.
        prompt: Jinja. White space at its ends is kept.
        choices: a list of Jinja texts, a choice each, as they stand; or one, which renders to all of them with "|||"
            between, white space around them left out.
        answer: the field that holds which choice is right: its index, or its text.
        metric: by which the task is evaluated: "accuracy", "f1" or "matthews_correlation".

    Raises:
        TypeError: a text is none.
        ValueError: a text is not Jinja, holds what prompts may not hold, or is too long; there are no choices; or the
            metric is unknown. The message names the template and the field.
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
        known = ", ".join(CLASSIFICATION)
        check(
            "metric", self.metric, self.metric in CLASSIFICATION, f"of template {self.name!r} must be one of {known}"
        )
        for field, text in (("prompt", self.prompt), *(("choices", text) for text in self.choice_texts)):
            try:
                parse(text)
            except ValueError as error:
                self.refuse(field, str(error), error)

    @property
    def choice_texts(self) -> tuple[str, ...]:
        """The Jinja sources of the choices; one where a single text renders to all of them."""
        return (self.choices,) if isinstance(self.choices, str) else tuple(self.choices)

    @property
    def fields(self) -> set[str]:
        """The fields of a row that prompt and choices read."""
        return {field for text in (self.prompt, *self.choice_texts) for field in parse(text)[1]}

    def render(self, row: Mapping[str, Any], answered: bool = True) -> dict[str, Any]:
        """The row as `prompt` (a text), `choices` (texts) and `answer` (an index of choices).

        Args:
            row: its fields, by name.
            answered: False leaves the answer out, for rows whose answer is not known.

        Raises:
            ValueError: a field is missing or is nothing that can be printed; a choice is empty; the answer is none of
                the choices; or a limit of `sandbox` is reached.
        """
        rendered = {"prompt": self.text("prompt", self.prompt, row), "choices": self.rendered_choices(row)}
        return rendered | ({"answer": self.index(row, rendered["choices"])} if answered else {})

    def rendered_choices(self, row: Mapping[str, Any]) -> list[str]:
        """The texts of the choices for a row.

        Raises:
            ValueError: a choice is empty, or a text of the row holds the separator.
        """
        choices = [self.text("choices", text, row) for text in self.choice_texts]
        if isinstance(self.choices, str):
            fields = parse(self.choices)[1]
            if any(SEPARATOR in text for field in fields for text in texts_in(row.get(field))):
                self.refuse("choices", f"cannot be told apart: a text of the row holds {SEPARATOR!r}; pass a list")
            choices = [choice.strip() for choice in choices[0].split(SEPARATOR)]
        if not all(choices):
            self.refuse("choices", f"must not be empty, as one of {choices!r} is")
        return choices

    def index(self, row: Mapping[str, Any], choices: list[str]) -> int:
        """The index of the right choice of a row.

        Raises:
            ValueError: the row has no answer, or one that is none of the choices.
        """
        if self.answer not in row:
            had = ", ".join(map(str, row)) or "none"
            self.refuse("answer", f"is the field {self.answer!r}, which the row does not have; it has {had}")
        answer = row[self.answer]
        if isinstance(answer, str) and answer in choices:
            return choices.index(answer)
        if isinstance(answer, Integral) and 0 <= int(answer) < len(choices):
            return int(answer)
        rule = f"must be one of the choices {choices!r} or its index, not {answer!r}"
        self.refuse("answer", rule)

    def text(self, field: str, source: str, row: Mapping[str, Any]) -> str:
        """A Jinja source rendered for a row; errors name the template and the field.

        Raises:
            ValueError: the source cannot be rendered for this row.
        """
        try:
            return render(source, row)
        except ValueError as error:
            self.refuse(field, str(error), error)

    def check_text(self, field: str, value: object) -> None:
        """Refuse a value that is no text.

        Raises:
            TypeError: `value` is no `str`.
        """
        if not isinstance(value, str):
            raise TypeError(f"`{field}` of template {self.name!r} must be a text, not {type(value).__name__}.")

    def refuse(self, field: str, rule: str, cause: Exception | None = None) -> NoReturn:
        """Raise a ValueError that names the field and the template."""
        raise ValueError(f"`{field}` of template {self.name!r} {rule}.") from cause


def texts_in(value: Any) -> Iterator[str]:
    """The texts of a field, however deep they lie."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for part in value.values() for text in texts_in(part))
    elif isinstance(value, Sequence):
        yield from (text for part in value for text in texts_in(part))
