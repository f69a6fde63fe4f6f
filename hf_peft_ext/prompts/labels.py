"""Prompt templates that list all labels, as in RAFT: an instruction, the labels, and the text to label."""

from collections.abc import Mapping, Sequence

from hf_peft_ext.prompts.template import PromptTemplate
from hf_peft_ext.validation.checks import check


def label_list_template(
    name: str,
    instruction: str,
    labels: Sequence[str],
    fields: Sequence[str] | Mapping[str, str] = ("text",),
    answer: str = "label",
    metric: str = "accuracy",
) -> PromptTemplate:
    """A template that lists the labels.

        Which service of the bank is the customer writing about?
        Possible labels:
        - change_pin
        - lost_card

        Text: I forgot my number.
        Label:

    RAFT: Alex et al. 2021 (https://arxiv.org/abs/2109.14076). T-Few is trained on it with such prompts. For tasks with
    dozens of labels (Banking77) T-Few omits the losses that compare choices: set `choice_weight` and
    `unlikelihood_weight` of `TFewTrainingArguments` to 0, or use `PromptedDataset(answer_only=True)`.

    Args:
        name: of the template.
        instruction: a literal text, not Jinja.
        labels: literal texts; they are the choices.
        fields: of a row, in this order. Each has its name as a caption; a mapping sets other captions.
        answer, metric: see `PromptTemplate`.

    Raises:
        ValueError: there are fewer than two labels or duplicate ones, or there is no field, or the name of a field is
            not a name in Jinja (letters, digits and underscores).
    """
    check("labels", labels, not isinstance(labels, str) and len(labels) > 1, "must be a list of at least two texts")
    check("labels", labels, len(set(labels)) == len(labels), "must not repeat a label")
    check("fields", fields, not isinstance(fields, str) and len(fields) > 0, "must be a list of at least one field")
    for field in fields:
        rule = "must be a name that Jinja can read; rename the column of the rows"
        check("fields", field, field.isidentifier(), rule)
    named = {field: field.replace("_", " ").capitalize() for field in fields}
    captions = fields if isinstance(fields, Mapping) else named
    label_lines = "".join(f"- {literal(label)}\n" for label in labels)
    field_lines = "".join(f"{literal(caption)}: {{{{ {field} | trim }}}}\n" for field, caption in captions.items())
    prompt = f"{literal(instruction)}\nPossible labels:\n{label_lines}\n{field_lines}Label:"
    return PromptTemplate(name, prompt, [literal(label) for label in labels], answer, metric)


def literal(text: str) -> str:
    """Jinja that renders to this text, braces included."""
    return text.replace("{", "{{ '{' }}")
