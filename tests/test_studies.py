"""The low-resource study, end to end on a tiny BERT and made-up data: it resumes, repeats, and ranks as by hand."""

import csv
import json
import random
import runpy
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

SCRIPT = Path(__file__).parents[1] / "examples" / "studies" / "unipelt_low_resource.py"
WORDS = ["good", "bad", "film", "plot", "the", "a"]


@pytest.fixture
def options(tmp_path):
    """The command line of a study of two tasks, two methods, two seeds."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    model, data, output = (tmp_path / name for name in ("model", "data", "output"))
    BertTokenizerFast(str(vocabulary)).save_pretrained(model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=11, **sizes)).save_pretrained(model)

    data.mkdir()
    draw = random.Random(0)
    for task, fields in {"sst2": ["text"], "stsb": ["sentence1", "sentence2"]}.items():
        for split in ("train", "dev"):
            rows = [{name: " ".join(draw.choices(WORDS, k=5)) for name in fields} for _ in range(24)]
            labels = [float(row[fields[0]].count("good")) for row in rows]
            rows = [row | {"label": y if task == "stsb" else int(y > 0)} for row, y in zip(rows, labels, strict=True)]
            (data / f"{task}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    what = ["--tasks", "sst2", "stsb", "--methods", "full", "APL", "--seeds", "0", "1", "--k", "10"]
    protocol = ["--epochs", "2", "--evaluate_every", "1", "--dev_rows", "8", "--tune_on", "sst2"]
    return [*what, *protocol, "--model", str(model), "--data", str(data), "--output", str(output)]


def run(monkeypatch, options):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as when it is started as a script
    runpy.run_path(str(SCRIPT), run_name="__main__")


def numbers(runs):
    """The rows, less the time that they took."""
    with runs.open(encoding="utf-8") as file:
        return [{name: x for name, x in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_resumes_and_repeats(monkeypatch, options, tmp_path):
    output = tmp_path / "output"
    runs = output / "runs.csv"
    run(monkeypatch, options)
    rows = numbers(runs)
    assert len(rows) == 2 * (3 + 1) + 2 * 2  # sst2: three rates at the first seed, one at the second; stsb: two seeds
    assert (output / "figure.png").stat().st_size > 0

    lines = runs.read_text(encoding="utf-8").splitlines(keepends=True)
    runs.write_text("".join(lines[:-5]), encoding="utf-8")  # as if it had been interrupted
    (output / "table.md").unlink()
    run(monkeypatch, options)
    assert numbers(runs) == rows
    assert "| APL |" in (output / "table.md").read_text(encoding="utf-8")

    written = runs.read_bytes()
    run(monkeypatch, options)
    assert runs.read_bytes() == written


def test_one_protocol_an_output(monkeypatch, options, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "protocol.json").write_text('{"epochs": 3}', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"`epochs` \(=2\) is 3 in .*; choose another --output\."):
        run(monkeypatch, options)


def test_report(monkeypatch, tmp_path):
    """The rate is chosen on dev at the first seed; ranks, ties, best sub-module and counts are as by hand."""
    tests = {
        "full": 60,
        "BitFit": 50,
        "adapter": 70,
        "prefix": 40,
        "LoRA": 70,
        "AP": 65,
        "APL": 80,
        "APL-no-gates": 90,
    }
    runs = [("sst2", m, seed, 0.1, 0.6, (t + 2 * seed) / 100) for m, t in tests.items() for seed in (0, 1)]
    runs += [("sst2", "prefix", 0, 0.2, 0.5, 0.99)]  # worse on dev: does not count
    runs += [("rte", m, seed, 0.1, 0.9, 0.5 if m == "APL" else 0.6) for m in tests for seed in (0, 1)]
    with (tmp_path / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "k", "method", "seed", "lr", "dev", "test"])
        writer.writerows((task, 100, *rest) for task, *rest in runs)
    run(monkeypatch, ["--report", "--output", str(tmp_path)])

    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    rows = {cells[1]: cells[2:-1] for line in lines if (cells := [cell.strip() for cell in line.split("|")])[1:]}
    assert rows["method"][1] == "sst2"
    assert rows["prefix"][:2] == ["0.1", "41.0 ± 1.4 (7)"]
    assert rows["adapter"][1] == rows["LoRA"][1] == "71.0 ± 1.4 (2.5)"
    assert rows["APL"][1] == "**81.0** ± 1.4 (1)"
    assert rows["APL"][-5:] == ["", "4.0", "1", "0", "1"]  # first on sst2, last of seven on rte
    assert rows["APL-no-gates"][1] == "91.0 ± 1.4"
    assert rows["APL-no-gates"][-4:] == ["", "", "", ""]
    assert rows["full"][-4:] == ["4.2", "1", "0", "0"]  # fifth on sst2; one of six that share the first place on rte
    assert rows["best sub-module"][1] == "adapter"
