"""Prompt templates: what they render to, against texts written out here, and what they say of what is wrong."""

import pickle

import numpy as np
import pytest

from hf_peft_ext import PromptTemplate

ROW = {"text": "It is fine.", "label": 1, "options": ["one", "two"], "inner": {"items": "kept"}, "none": None}


def template(prompt="{{ text }}", choices=("no", "yes"), **kwargs):
    return PromptTemplate("mine", prompt, choices, **kwargs)


def test_renders():
    assert template("{{ text }} Really?").render(ROW) == {
        "prompt": "It is fine. Really?",
        "choices": ["no", "yes"],
        "answer": 1,
    }


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ text | rstrip('. ') }} or {{ text | lower | replace('fine', 'bad') }}", "It is fine or it is bad."),
        ("{% for option in options %}{{ loop.index }} {{ option }}\n{% endfor %}", "1 one\n2 two\n"),
        ("{% if label == 1 and not none %}yes{% else %}no{% endif %}", "yes"),
        ("{{ options[label] }} {{ options[-1][0] }} {{ text[:5] }} {{ ['a', 'b'][label] }}", "two t It is b"),
        ("{{ options | join(', ') }} {{ {1: 'one'}[label] }} {{ inner.items }}", "one, two one kept"),
        ("{{ missing | default('none') }}{# a comment #} {{ 'x' if label is odd else 'y' }}\n", "none x\n"),
        ("{% raw %}{{ as it is }}{% endraw %} <b>&</b>", "{{ as it is }} <b>&</b>"),
    ],
)
def test_what_prompts_may_hold(source, text):
    assert template(source).render(ROW)["prompt"] == text


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ("{{ options | join('|||') }}", ["one", "two"]),
        ("no ||| {{ text }}\n", ["no", "It is fine."]),
        (["{{ options[1] }}", " two "], ["two", " two "]),
        ("{% for option in options %}{{ option }}{{ '' if loop.last else '|||' }}{% endfor %}", ["one", "two"]),
    ],
)
def test_choices(choices, expected):
    assert template(choices=choices).render(ROW)["choices"] == expected


@pytest.mark.parametrize(("answer", "index"), [(0, 0), (True, 1), (np.int64(1), 1), ("yes", 1)])
def test_answers(answer, index):
    """An index of any kind, or the choice itself."""
    found = template(answer="gold").render({"text": "a", "gold": answer})["answer"]
    assert found == index
    assert type(found) is int


def test_rows_without_an_answer():
    """Those that are to be predicted."""
    assert template().render({"text": "a"}, answered=False) == {"prompt": "a", "choices": ["no", "yes"]}


def test_templates_are_values():
    """Equal, hashable and sent to other processes; and they say which fields they read."""
    one = template("{{ text }} {{ missing | default('') }}", choices=["{{ a }}", "b"])
    assert pickle.loads(pickle.dumps(one)) == one
    assert len({one, template()}) == 2
    assert one.fields == {"text", "missing", "a"}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"prompt": "{{ text }"}, ValueError, r"`prompt` of template 'mine' is not valid Jinja: .*\(line 1\)\."),
        ({"prompt": "a\n{% if %}"}, ValueError, r"is not valid Jinja: .*\(line 2\)\."),
        ({"prompt": None}, TypeError, "`prompt` of template 'mine' must be a text, not NoneType."),
        ({"choices": 3}, TypeError, "`choices` of template 'mine' must be a text, or a list of texts."),
        ({"choices": ["a", 3]}, TypeError, "`choices` of template 'mine' must be a text, not int."),
        ({"choices": []}, ValueError, "`choices` of template 'mine' must hold at least one choice."),
        ({"choices": ["a", "{{ b"]}, ValueError, "`choices` of template 'mine' is not valid Jinja"),
        (
            {"metric": "bleu"},
            ValueError,
            r"`metric` \(='bleu'\) of template 'mine' must be one of accuracy, f1, matthews_correlation.",
        ),
    ],
)
def test_errors_of_templates(kwargs, error, message):
    with pytest.raises(error, match=message):
        template(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "row", "message"),
    [
        ({}, {"txt": "a", "label": 0}, "cannot be rendered: 'text' is undefined; the row has the fields txt, label."),
        (
            {},
            {"text": "a"},
            "`answer` of template 'mine' is the field 'label', which the row does not have; it has text",
        ),
        (
            {},
            {"text": "a", "label": 2},
            r"`answer` .* must be one of the choices \['no', 'yes'\] or its index, not 2.",
        ),
        ({}, {"text": "a", "label": -1}, "or its index, not -1."),
        ({}, {"text": "a", "label": "maybe"}, "or its index, not 'maybe'."),
        ({}, {"text": "a", "label": 1.0}, "or its index, not 1.0."),
        ({}, {"text": None, "label": 0}, "it prints a NoneType; only texts and numbers can be printed."),
        ({"choices": "{{ text }}|||b"}, {"text": " ", "label": 0}, r"must not be empty, as one of \['', 'b'\] is."),
        (
            {"choices": "{{ text }}|||b"},
            {"text": "x ||| y", "label": 0},
            r"`choices` .* cannot be separated: a text of the row holds '\|\|\|'; pass a list.",
        ),
    ],
)
def test_errors_of_rows(kwargs, row, message):
    with pytest.raises(ValueError, match=message):
        template(**kwargs).render(row)
