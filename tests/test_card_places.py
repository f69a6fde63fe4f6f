"""What a published card and its record must not hold: folders and user names of one machine, numbers that are no JSON,
and counts of runs that were not made."""

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from hf_peft_ext.hub_cards import Result, TrainingRecord, write_card
from hf_peft_ext.hub_cards.redact import local, without_places
from hf_peft_ext.hub_cards.sections import spread
from hf_peft_ext.trainers.run_info import command_line

from .cards import full_record, saved

# as it is written -> as it is published
PATHS = {
    "/home/ann/runs/x.json": "x.json",
    "/home/ann": "~",
    "~/runs/a": "a",
    "~ann/x": "x",
    "C:\\Users\\Ann\\x.json": "x.json",
    "C:\\Users\\Ann": "~",
    "D:/Users/Ann B/x.json": "x.json",
    "\\\\server\\share\\ann\\f.txt": "f.txt",
    "--data=/home/ann/my data/x.json": "--data=x.json",
    "data=~/x": "data=x",
    "sqlite:////home/ann/search.db": "sqlite:///search.db",
    "json:/home/ann/x.json": "json:x.json",
    'read ["/home/ann/a.json", "/mnt/ann/b.json"]': 'read ["a.json", "b.json"]',
    "python /home/ann/train.py --output_dir /home/ann/out": "python train.py --output_dir out",
}
KEPT = (
    "https://huggingface.co/acme/tiny-bert", "s3://bucket/home/data", "sqlite:///search.db", "acme/tiny-bert",
    "and/or", "data/train.json", "../x.json", "/no_think {{ text }}", "{{ a }}/{{ b }}/c", "s/a/b/g", "1/2",
    "</s>", "/", "", "postgresql+psycopg://user@host/name", "accuracy: 0.5/0.25",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_absolute_paths(path):
    assert without_places(path) == PATHS[path]
    assert without_places({path: [path, 3, None]}) == {PATHS[path]: [PATHS[path], 3, None]}
    assert without_places(PATHS[path]) == PATHS[path]


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_absolute_path(text):
    assert without_places(text) == text


def test_paths_inside_the_working_directory(tmp_path, monkeypatch):
    """They become relative, so that the command works elsewhere; a home with a space is known, too."""
    monkeypatch.chdir(tmp_path)
    assert without_places(str(tmp_path / "data" / "x.json")) == "data/x.json"
    monkeypatch.setattr(Path, "home", lambda: Path("/home/Ann B"))
    assert without_places("see /home/Ann B/notes/x.txt, please") == "see x.txt, please"


def test_a_base_model_in_a_folder_is_no_id_on_the_hub():
    assert local("/home/ann/models/tiny") == "./tiny"
    assert local("acme/tiny") == "acme/tiny"
    assert local(None) is None


def test_the_command(monkeypatch):
    arguments = ["recipe.yaml", "output_dir=/home/ann/out", "--data", "/home/ann/my data/rows.json"]
    monkeypatch.setattr(sys, "argv", ["/home/ann/.venv/bin/hf-peft-ext", "train", *arguments])
    assert command_line() == "hf-peft-ext train recipe.yaml output_dir=out --data rows.json"


def test_card_and_recipe(tmp_path):
    """Of a record that was saved by an earlier version, as well."""
    saved(tmp_path, "unipelt")
    record = full_record()
    record.recipe = {"model": "/home/ann/models/tiny", "data": {"train": "C:\\Users\\ann\\rows.json"}}
    record.command = shlex.join(["hf-peft-ext", "train", "/home/ann/recipe.yaml"])
    record.save(tmp_path)
    write_card(tmp_path)
    for name in ("README.md", "recipe.yaml"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "ann" not in text.replace("annot", "").replace("channel", "").replace("planned", "")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"] == {"train": "rows.json"}


def test_numbers_that_are_not_finite(tmp_path):
    """The record is JSON, and reads as before."""
    record = TrainingRecord(
        results=[Result("loss", math.nan, math.inf, 2)],
        history=[{"step": 1, "loss": math.nan, "grad_norm": math.inf}],
        gates={"0.query": math.nan},
        hyperparameters={"max_grad_norm": math.inf},
        step_time=math.nan,
    )

    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads(record.save(tmp_path).read_text(), parse_constant=refuse)
    assert stored["history"] == [{"step": 1, "loss": None, "grad_norm": None}]
    found = TrainingRecord.load(tmp_path)
    assert math.isnan(found.results[0].value)
    assert math.isnan(found.history[0]["loss"])
    assert math.isnan(found.gates["0.query"])
    assert (found.results[0].spread, found.step_time, found.hyperparameters) == (None, None, {"max_grad_norm": None})
    saved(tmp_path, "unipelt")
    found.save(tmp_path)
    write_card(tmp_path)  # as it stands


def result(method, runs, metric="accuracy"):
    return Result(metric, 0.5, 0.1 if runs > 1 else None, runs, method)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([result("adapter", 1), result("base", 1)], None),
        ([result("adapter", 3), result("lora", 3)], "over 3 runs."),
        ([result("adapter", 2), result("adapter", 5, "f1")], "over 2 to 5 runs."),
        ([result("adapter", 1), result("lora", 3)], "where there were several runs: LoRA 3."),
        ([result("adapter", 3), result("base", 1)], "over 3 runs."),
        ([result("adapter", 3), result("lora", 5)], "where there were several runs: this adapter 3, LoRA 5."),
        ([result("own", 4), result("adapter", 1)], "where there were several runs: `own` 4."),
    ],
)
def test_how_many_runs(found, said):
    assert spread(found) == (said and f"Mean ± standard deviation {said}")
