"""The templates of this package on a row written for each task, and YAML files of templates, right and wrong."""

import json
import os
from pathlib import Path

import pytest

from hf_peft_ext import PromptTemplate, load_templates
from hf_peft_ext.prompts import documented_fields, template_tasks

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
            "mine.yaml has unknown keys in template 1: promt; allowed are answer",
        ),
        ("metric: f1", "metrics: f1", ValueError, "mine.yaml has unknown keys in the file: metrics"),
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
        ("name: two", "name: one", ValueError, "mine.yaml has 2 templates with the name 'one'"),
        (
            "{{ text }}?",
            "{{ txt }}?",
            ValueError,
            "mine.yaml lacks in `fields` what template 'two' reads: txt",
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
        ("{text: a text, gold: yes or no}", "[text]", TypeError, "mine.yaml: `fields` must map each field"),
        (FILE, "templates: []", TypeError, "mine.yaml: `templates` must be a list of at least one template"),
        (FILE, "text", TypeError, "mine.yaml: the file must be a mapping"),
        (FILE, "#" * 1_000_001, ValueError, "mine.yaml has 1,000,001 bytes; a set of templates may have 1,000,000"),
        (FILE, "[" * 600, ValueError, "mine.yaml is not YAML"),
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
    with pytest.raises(ValueError, match=r"mine\.yaml has unknown keys in the file: a0"):
        load_templates(path)
    path.write_text("fields:\n" + "\n".join(f"  {line}" for line in lines) + "\nchoices: *a8\ntemplates: [*a8]")
    with pytest.raises(TypeError, match="`fields` must map"):
        load_templates(path)


def test_tags_make_nothing(tmp_path):
    """What YAML could make Python objects of is a plain list of texts."""
    path = tmp_path / "mine.yaml"
    path.write_text(FILE.replace("choices: [", f"choices: !!python/object/apply:os.mkdir [{tmp_path}/made, "))
    assert load_templates(path)[0].choices == (f"{tmp_path}/made", "no", "yes")
    assert not (tmp_path / "made").exists()


def test_unknown_tasks_and_files(tmp_path):
    for function in (load_templates, documented_fields):
        with pytest.raises(ValueError, match=r"`source` \(='cop'\) must be one of ag_news, .*, or the path of a file"):
            function("cop")
    with pytest.raises(FileNotFoundError):
        load_templates(tmp_path / "none.yaml")
