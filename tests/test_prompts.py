"""Prompt templates: what they render to, against texts written out here; and what they must refuse to do."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from hf_peft_ext import PromptTemplate, load_templates
from hf_peft_ext.prompts import documented_fields, template_tasks
from hf_peft_ext.prompts.sandbox import MAX_SOURCE

ROW = {"text": "It is fine.", "label": 1, "options": ["one", "two"], "inner": {"items": "kept"}, "none": None}
PAIR = {"premise": "Two men ate.", "hypothesis": "Somebody ate.", "label": 0}
# a row for each task, with the fields that its file says it has
ROWS = {
    "ag_news": {"text": "A club won its match.", "label": 1},
    "anli": PAIR,
    "boolq": {"passage": "Cats are animals.", "question": "is a cat an animal", "label": 1},
    "cb": PAIR,
    "cola": {"text": "They sleeps.", "label": 0},
    "comve": {"choices": ["He drank a stone.", "He drank milk."], "label": 1},
    "copa": {"premise": "The cup broke.", "question": "cause", "choices": ["It fell.", "It shone."], "label": 0},
    "hellaswag": {"context": "A man sits down. he", "choices": ["eats.", "melts.", "flies.", "rains."], "label": 0},
    "mnli": PAIR,
    "mrpc": {"sentence1": "He left.", "sentence2": "He went away.", "label": 1},
    "multirc": {"passage": "Ann has a dog.", "question": "Who has a dog?", "answer": "Ann", "label": 1},
    "qnli": {"question": "Who left?", "sentence": "Ann left.", "label": 0},
    "rte": PAIR,
    "sst2": {"text": "a joy to watch . ", "label": 1},
    "storycloze": {"context": "Ann ran. She fell.", "choices": ["It hurt.", "It sang."], "label": 0},
    "trec": {"text": "Who left ?", "label": 3},
    "wic": {"word": "bank", "sentence1": "A bank lends.", "sentence2": "The bank of a river.", "label": 0},
    "winogrande": {"sentence": "The _ was too big.", "choices": ["cup", "box"], "label": 1},
    "wsc": {"text": "Ann left when she was tired.", "span1_text": "Ann", "span2_text": "she", "label": 1},
}


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
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ text['__class__'] }}",
        "{{ text['__cla' 'ss__']['__mro__'] }}",
        "{{ text[key] }}",
        "{{ text[key][mro][1] }}",
        "{{ text | attr('__class__') }}",
        "{{ [text] | map(attribute='__class__') | first }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ self }}",
        "{{ loop }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ '{0.__class__}' | format(text) }}",
        "{{ '%s' % text }}",
        "{{ text.upper }}",
        "{{ text.upper() }}",
        "{{ namespace(a=1) }}",
        "{{ lipsum(10000) }}",
        "{{ config }}",
        "{{ options.append(1) }}",
        "{% set x = 1 %}",
        "{% with x = 1 %}{% endwith %}",
        "{% import 'os' as os %}",
        "{% from 'os' import system %}",
        "{% include '/etc/passwd' %}",
        "{% extends 'base' %}",
        "{% block a %}{% endblock %}",
        "{% macro a() %}{{ a() }}{% endmacro %}",
        "{% call x() %}{% endcall %}",
        "{% filter upper %}a{% endfilter %}",
        "{% autoescape true %}{% endautoescape %}",
        "{% for a in options recursive %}{{ loop(a) }}{% endfor %}",
        "{{ options | tojson }}",
        "{{ text | random }}",
        "{{ none }}",
        "{{ options }}",
    ],
)
def test_attacks_are_refused(source):
    """Each either when the template is made, or when it meets a row; always as a ValueError that says where."""
    row = {**ROW, "key": "__class__", "mro": "__mro__"}
    with pytest.raises(ValueError, match=r"^`prompt` of template 'mine' (must not hold|cannot be rendered: )"):
        template(source).render(row)


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("{{ 'a' * 1000000000 }}", "must not hold Jinja's Mul"),
        ("{{ 10 ** 10 ** 10 }}", "must not hold Jinja's Pow"),
        ("{{ text ~ text }}", "must not hold Jinja's Concat"),
        ("{{ '%1000000000d' % 1 }}", "must not hold Jinja's Mod"),
        ("{% for a in range(999999999) %}{% endfor %}", "must not hold Jinja's Call"),
        ("{{ text | center(1000000000) }}", "must not hold the filter 'center'"),
        ("{{ text" + " | replace('i', text)" * 30 + " }}", "it makes a text of more than 1,000,000 characters"),
        ("{{ options | join(long) }}" * 4, "it makes a text of more than 1,000,000 characters"),
        ("{{ long }}" * 4, "it makes a text of more than 1,000,000 characters"),
        ("{% for a in long %}" * 12 + "{% endfor %}" * 12, "its loops are gone through more than 1,000 times"),
        ("{% for a in long %}{{ loop.length }}{% endfor %}", "its loops are gone through more than 1,000 times"),
        ("{% for a in options %}" * 40 + "{% endfor %}" * 40, "is nested too deeply"),
        ("{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}", "is nested too deeply"),
        ("{{ " + "-" * 4000 + "1 }}", "is nested too deeply"),
        ("a" * (MAX_SOURCE + 1), "must have at most 10,000 characters, not 10,001"),
    ],
)
def test_templates_are_bounded(source, rule):
    """In what they make, in how often they go round, and in how long they are."""
    with pytest.raises(ValueError, match=rule):
        template(source).render({**ROW, "long": "a" * 300_000})


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
            r"`choices` .* cannot be told apart: a text of the row holds '\|\|\|'; pass a list.",
        ),
    ],
)
def test_errors_of_rows(kwargs, row, message):
    with pytest.raises(ValueError, match=message):
        template(**kwargs).render(row)


def test_every_task_is_tested():
    assert template_tasks() == sorted(ROWS)


@pytest.mark.parametrize("task", sorted(ROWS))
def test_templates_of_the_package(task):
    """Three or more a task, that differ; each shows what it may read, and leaves no trace of Jinja."""
    row, templates = ROWS[task], load_templates(task)
    assert set(documented_fields(task)) == set(row)
    assert len(templates) >= 3
    rendered = [template.render(row) for template in templates]
    assert len({example["prompt"] for example in rendered}) == len(templates)
    for template, example in zip(templates, rendered, strict=True):
        assert example["answer"] == row["label"]
        assert len(set(example["choices"])) == len(example["choices"]) >= 2
        assert example["prompt"] == example["prompt"].strip()
        assert not {"{", "}", "|"} & set(example["prompt"] + "".join(example["choices"]))
        shown = example["prompt"] + "".join(example["choices"])
        for field in template.fields - {"label", "choices", "question", "sentence"}:
            assert row[field].strip(" .") in shown
        for choice in row.get("choices", []):
            assert choice[1:] in shown


def test_wording_of_one_task():
    """COPA to the letter."""
    texts = {one.name: one.render(ROWS["copa"]) for one in load_templates("copa")}
    assert texts["because"] == {"prompt": "The cup broke because", "choices": ["it fell.", "it shone."], "answer": 0}
    assert texts["question"]["prompt"] == "The cup broke.\nWhy did this happen?"
    effect = load_templates("copa")[0].render({**ROWS["copa"], "question": "effect"})
    assert effect["prompt"] == "The cup broke so"


@pytest.mark.slow
@pytest.mark.skipif("HF_PEFT_EXT_DATA" not in os.environ, reason="real data: set HF_PEFT_EXT_DATA to its folder")
@pytest.mark.parametrize("task", sorted(ROWS))
def test_real_rows(task):
    """Every template renders every row of the real data, with all answers in use."""
    folder = Path(os.environ["HF_PEFT_EXT_DATA"])
    files = sorted(folder.glob(f"{task}.dev.jsonl")) or sorted(folder.glob(f"{task}_r*.dev.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    if task == "multirc":
        rows = [
            {**row, "answer": a, "label": b}
            for row in rows
            for a, b in zip(row["answers"], row["labels"], strict=True)
        ]
    for template in load_templates(task):
        rendered = [template.render(row) for row in rows]
        assert {example["answer"] for example in rendered} == set(range(len(rendered[0]["choices"])))


FILE = """
fields: {text: a text, gold: yes or no}
choices: [no, yes]
answer: gold
metric: f1
templates:
- {name: one, prompt: "{{ text }}"}
- {name: two, prompt: "{{ text }}?", choices: "off ||| on", metric: accuracy}
"""


def test_own_files(tmp_path):
    """Words that YAML would take for numbers and booleans stay words; a template's keys go before the file's."""
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    assert (
        load_templates(path)
        == load_templates(str(path))
        == [
            PromptTemplate("one", "{{ text }}", ["no", "yes"], "gold", "f1"),
            PromptTemplate("two", "{{ text }}?", "off ||| on", "gold", "accuracy"),
        ]
    )


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (
            "prompt: ",
            "promt: ",
            ValueError,
            "mine.yaml has keys in template 1 that are not known: promt; known are answer",
        ),
        ("metric: f1", "metrics: f1", ValueError, "mine.yaml has keys in the file that are not known: metrics"),
        ("metric: f1", "metric: f2", ValueError, r"mine.yaml: `metric` \(='f2'\) of template 'one' must be one of"),
        ("choices: [no, yes]", "", ValueError, "mine.yaml lacks keys in template 1: choices"),
        (
            "choices: [no, yes]",
            "choices: [no, [yes]]",
            TypeError,
            "mine.yaml: `choices` of template 'one' must be a text",
        ),
        (
            "choices: [no, yes]",
            "choices: {no: yes}",
            TypeError,
            "`choices` of template 'one' must be a text, or a list",
        ),
        ("name: two", "name: one", ValueError, "mine.yaml has 2 templates of the name 'one'"),
        (
            "{{ text }}?",
            "{{ txt }}?",
            ValueError,
            "mine.yaml says nothing in `fields` of what template 'two' reads: txt",
        ),
        (
            "{{ text }}?",
            "{{ text() }}?",
            ValueError,
            "mine.yaml: `prompt` of template 'two' must not hold Jinja's Call",
        ),
        ("templates:", "templates: [", ValueError, "mine.yaml is not YAML"),
        ("templates:", "choices:", ValueError, "mine.yaml lacks keys in the file: templates"),
        (
            "- {name: one,",
            "- x\n- {name: one,",
            TypeError,
            "mine.yaml: template 1 must be a mapping of keys to values",
        ),
        ("{text: a text, gold: yes or no}", "[text]", TypeError, "mine.yaml: `fields` must say of each field"),
        (FILE, "templates: []", TypeError, "mine.yaml: `templates` must be a list of at least one template"),
        (FILE, "text", TypeError, "mine.yaml: the file must be a mapping"),
        (FILE, "#" * 1_000_001, ValueError, "mine.yaml has 1,000,001 bytes, more than the 1,000,000"),
        (FILE, "[" * 5_000, ValueError, "mine.yaml is not YAML"),
    ],
)
def test_errors_of_files(tmp_path, old, new, error, message):
    assert old in FILE
    path = tmp_path / "mine.yaml"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(error, match=message):
        load_templates(path)


def test_aliases_that_multiply(tmp_path):
    """A few lines of YAML that stand for 10^9 texts are refused without being written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines) + "\nchoices: *a8\ntemplates: *a8")
    with pytest.raises(ValueError, match=r"mine\.yaml has keys in the file that are not known: a0"):
        load_templates(path)
    path.write_text("fields:\n" + "\n".join(f"  {line}" for line in lines) + "\nchoices: *a8\ntemplates: [*a8]")
    with pytest.raises(TypeError, match="`fields` must say"):
        load_templates(path)


def test_tags_make_nothing(tmp_path):
    """What YAML could make Python objects of is a plain list of texts."""
    path = tmp_path / "mine.yaml"
    path.write_text(FILE.replace("choices: [", f"choices: !!python/object/apply:os.mkdir [{tmp_path}/made, "))
    assert load_templates(path)[0].choices == (f"{tmp_path}/made", "no", "yes")
    assert not (tmp_path / "made").exists()


def test_unknown_tasks_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"`source` \(='cop'\) must be one of ag_news, .*, or the path of a file"):
        load_templates("cop")
    with pytest.raises(FileNotFoundError):
        load_templates(tmp_path / "none.yaml")
