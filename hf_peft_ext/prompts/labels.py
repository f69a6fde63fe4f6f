"""Tasks that are told their labels, as those of RAFT: an instruction, the list of labels, and what to label."""

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

    RAFT, Alex et al. 2021 (https://arxiv.org/abs/2109.14076); T-Few trains on it with such prompts. For tasks with
    dozens of labels it leaves the losses out that compare choices (Banking77): with `TFewTrainingArguments` set
    `choice_weight` and `unlikelihood_weight` to 0; with other trainers, `PromptedDataset(answer_only=True)`.

    Args:
        name: of the template.
        instruction: a text, as it stands.
        labels: texts, as they stand; the choices.
        fields: of a row, in this order; each is shown behind its name, or behind what a mapping says.
        answer, metric: see `PromptTemplate`.

    Raises:
        ValueError: there are fewer than two labels, or one is there twice; or there is no field, or one that
            is no name in Jinja (letters, digits and underscores).
    """
    check("labels", labels, not isinstance(labels, str) and len(labels) > 1, "must be a list of at least two texts")
    check("labels", labels, len(set(labels)) == len(labels), "must hold a label once")
    check("fields", fields, not isinstance(fields, str) and len(fields) > 0, "must be a list of at least one field")
    for field in fields:
        check(
            "fields", field, field.isidentifier(), "must be a name that Jinja can read; rename the column of the rows"
        )
    captions = (
        fields if isinstance(fields, Mapping) else {field: field.replace("_", " ").capitalize() for field in fields}
    )
    listed = "".join(f"- {literal(label)}\n" for label in labels)
    shown = "".join(f"{literal(caption)}: {{{{ {field} | trim }}}}\n" for field, caption in captions.items())
    prompt = f"{literal(instruction)}\nPossible labels:\n{listed}\n{shown}Label:"
    return PromptTemplate(name, prompt, [literal(label) for label in labels], answer, metric)


def literal(text: str) -> str:
    """Jinja that renders to a text, whatever it holds."""
    return text.replace("{", "{{ '{' }}")
