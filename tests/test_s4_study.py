"""The study of S4's search, end to end on a tiny BERT and made-up data: search, comparison, table; and it goes on."""

import csv
import json
import random
import runpy
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

STUDIES = Path(__file__).parents[1] / "examples" / "studies"
WORDS = ["good", "bad", "film", "plot", "the", "a"]


@pytest.fixture
def options(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    model, data, output = (tmp_path / name for name in ("model", "data", "output"))
    BertTokenizerFast(str(vocabulary)).save_pretrained(model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=11, **sizes)).save_pretrained(model)
    data.mkdir()
    draw = random.Random(0)
    for task, fields in {"sst2": ["text"], "stsb": ["sentence1", "sentence2"]}.items():
        for split in ("train", "dev"):
            rows = [{name: " ".join(draw.choices(WORDS, k=5)) for name in fields} for _ in range(140)]
            labels = [float(row[fields[0]].count("good")) for row in rows]
            rows = [row | {"label": y if task == "stsb" else int(y > 0)} for row, y in zip(rows, labels, strict=True)]
            (data / f"{task}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    scale = ["--models", "1", "--examples", "8", "--score_rows", "8", "--epochs", "1", "--groups", "1"]
    final = ["--seeds", "0", "1", "--k", "8", "--final_epochs", "2", "--test_rows", "8", "--budget", "0.06"]
    places = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return ["--tasks", "sst2", "stsb", *scale, *final, *places]


def run(monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["s4_search.py", *options])
    monkeypatch.syspath_prepend(str(STUDIES))
    runpy.run_path(str(STUDIES / "s4_search.py"), run_name="__main__")


@pytest.mark.slow
def test_study(monkeypatch, options, tmp_path):
    output = tmp_path / "output"
    run(monkeypatch, options)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "<h2>S4 strategies of G1</h2>" in page
    assert "<h2>The result</h2>" in page
    lines = (output / "table.md").read_text(encoding="utf-8").splitlines()
    names = ["S4, found", "S4, paper", "adapter", "prefix", "BitFit", "LoRA", "full"]
    assert [line.split("|")[1].strip() for line in lines[2:]] == names
    with (output / "comparison.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(names) * 2 * (3 + 1)  # methods, tasks, three rates at the first seed and one at the second
    assert (output / "figure.png").stat().st_size > 0
    written = (output / "comparison.csv").read_bytes(), page
    run(monkeypatch, options)
    assert ((output / "comparison.csv").read_bytes(), (output / "report.html").read_text(encoding="utf-8")) == written
