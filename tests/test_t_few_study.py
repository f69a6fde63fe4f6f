"""The T-Few study, end to end on a tiny Llama and made-up data: it resumes and repeats; its tables are as by hand."""

import csv
import json
import random
import runpy
import sys
from pathlib import Path

import pytest

from .backbones import BACKBONES
from .test_rank_classification import tokenizer

SCRIPT = Path(__file__).parents[1] / "examples" / "studies" / "t_few.py"
COMVE = [("(IA)3", "LM", 0), ("LoRA", "LM", 0), ("(IA)3", "LM", 1)]  # runs of a task without such a split
WORDS = ["good", "bad", "film", "plot", "the", "a"]


@pytest.fixture
def options(tmp_path):
    """The command line of a study of two tasks, one with a split of T-Few's own, one without."""
    model, data = tmp_path / "model", tmp_path / "data"
    BACKBONES["llama"].build(vocab_size=320).save_pretrained(model)
    tokenizer().save_pretrained(model)
    data.mkdir()
    draw = random.Random(0)
    for name in ("sst2_tfew.train", "sst2.dev", "comve.train", "comve.dev"):
        rows = [{"idx": i, "label": i % 2, "text": " ".join(draw.choices(WORDS, k=3))} for i in range(40)]
        rows = [row | {"choices": ["a good plot", row["text"]]} for row in rows]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (data / "tfew_seeds.json").write_text('{"sst2": {"0": [4, 3, 7, 8]}}', encoding="utf-8")
    what = ["--tasks", "sst2", "comve", "--seeds", "0", "--losses", "LM", "LM+LN+UL"]
    what += ["--methods", "zero-shot", "in-context", "(IA)3"]
    protocol = ["--steps", "2", "--batch_size", "2", "--k", "2", "--test_rows", "6", "--templates", "2"]
    return [*what, *protocol, "--model", str(model), "--data", str(data), "--output", str(tmp_path / "output")]


def run(monkeypatch, options):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as when it is started as a script
    return runpy.run_path(str(SCRIPT), run_name="__main__")


def numbers(runs):
    """The rows, less the time that they took."""
    with runs.open(encoding="utf-8") as file:
        return [{name: x for name, x in row.items() if not name.endswith("seconds")} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_resumes_and_repeats(monkeypatch, options, tmp_path):
    runs = tmp_path / "output" / "runs.csv"
    run(monkeypatch, options)
    rows = numbers(runs)
    assert [row["method"] for row in rows] == ["zero-shot"] * 2 + ["in-context"] * 2 + ["(IA)3"] * 4
    zero, shown = rows[0], rows[2]
    assert int(shown["test_tokens"]) > int(zero["test_tokens"])  # two answered rows in front
    assert zero["trained_parameters"] == "0" < rows[4]["trained_parameters"]
    lines = runs.read_text(encoding="utf-8").splitlines(keepends=True)
    runs.write_text("".join(lines[:-3]), encoding="utf-8")  # as if it had been interrupted
    run(monkeypatch, options)
    assert numbers(runs) == rows
    table = (tmp_path / "output" / "table.md").read_text(encoding="utf-8")
    assert "| (IA)3 | LM+LN+UL |" in table
    assert (tmp_path / "output" / "figure.png").stat().st_size > 0


def test_splits(monkeypatch, options, tmp_path):
    """T-Few's own rows in their order, or a draw that depends on the seed alone."""
    study = run(monkeypatch, [*options, "--report"])
    split, data = study["few_shot_split"], tmp_path / "data"
    assert [row["idx"] for row in split(study["Run"]("sst2", "(IA)3", "LM", 0), data)] == [4, 3, 7, 8]
    first, other, second = (split(study["Run"]("comve", *run), data) for run in COMVE)
    assert len(first) == 32
    assert first == other != second


def test_report(monkeypatch, options, tmp_path):
    """Means over seeds, gains over pairs of the same seed, FLOPs of a decoder: 6 N and 2 N a token."""
    study = run(monkeypatch, [*options, "--report"])
    common = {"train_seconds": 2, "test_seconds": 0.1, "train_tokens": 10, "test_tokens": 5, "model_parameters": 100}
    runs = [("sst2", "zero-shot", "", -1, 0.5), ("sst2", "(IA)3", "LM", 0, 0.6), ("sst2", "(IA)3", "LM", 1, 0.7)]
    runs += [("sst2", "(IA)3", "LM+LN", 0, 0.7), ("sst2", "(IA)3", "LM+LN", 1, 0.9)]
    names = ("task", "method", "losses", "seed", "accuracy")
    rows = [dict(zip(names, row, strict=True)) | common | {"trained_parameters": 250} for row in runs]
    table = study["table"](study["read_scores"](rows), rows)
    assert "| (IA)3 | LM | 65.0 ± 7.1 |" in table
    assert "| zero-shot |  | 50.0 |" in table
    assert "| (IA)3 LM | (IA)3 LM+LN | 2 | +15.0 | 5.0 | 0.205 |" in table
    assert "| (IA)3 | LM+LN | 2 | 0.10 | 6.0e+03 | 1.0e+03 | 1 kB | 80.0 |" in table


def test_figures(monkeypatch, options, tmp_path):
    """Tasks that lack one of the three ways have no row; what a loss adds is over pairs of task and seed."""
    study = run(monkeypatch, [*options, "--report"])
    figures = sys.modules["t_few_figures"]
    assert len(figures.STEPS) <= 12
    zero, shown, t_few = figures.WAYS.values()
    scores = {("sst2", zero): {-1: 50.0}, ("sst2", shown): {0: 55.0}, ("sst2", t_few): {0: 60.0, 1: 70.0}}
    scores |= {("rte", zero): {-1: 50.0}, ("sst2", ("(IA)3", "LM+LN")): {0: 61.0, 1: 68.0, 2: 10.0}}
    assert figures.added(scores, ("(IA)3", "LM+LN"), t_few) == [-1.0, 2.0]
    study["draw"](scores, tmp_path / "figure.png")
    assert study["draw_variants"](scores, tmp_path / "variants.png")
    assert not figures.draw_variants({}, tmp_path / "none.png")
    assert (tmp_path / "figure.png").exists()
    assert not (tmp_path / "none.png").exists()
