"""The study of ReLoRA, end to end on a tiny model: it resumes, and the runs differ only where they should."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

from .backbones import BACKBONES
from .test_training import tokenizer

STUDIES = Path(__file__).parents[1] / "examples" / "studies"
# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


def test_study(monkeypatch, tmp_path):
    """Curves are alike until the first restart; a second start trains nothing, another protocol is refused."""
    BACKBONES["llama"].build().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    words = " ".join(f"w{i * i % 40}" for i in range(2000))
    (tmp_path / "wikitext2.valid.txt").write_text(words, encoding="utf-8")
    monkeypatch.syspath_prepend(STUDIES)
    options = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    options += ["--steps", "8", "--merge_every", "4", "--length", "8", "--eval_rows", "2"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["relora", *options, *more])
        runpy.run_path(str(STUDIES / "relora.py"), run_name="__main__")

    run()
    with (tmp_path / "out" / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["2", "4", "2", "2"]
    assert len({row["held-out before"] for row in rows}) == 1
    with (tmp_path / "out" / "curves.csv").open(encoding="utf-8") as file:
        curves = list(csv.DictReader(file))
    losses = {row["run"]: [one["loss"] for one in curves if one["run"] == row["run"]] for row in rows}
    assert losses["LoRA, r = 2"][:4] == losses["ReLoRA, r = 2"][:4]
    assert losses["LoRA, r = 2"][6:] != losses["ReLoRA, r = 2"][6:]
    written = (tmp_path / "out" / "runs.csv").read_bytes()
    run()
    assert (tmp_path / "out" / "runs.csv").read_bytes() == written
    with pytest.raises(SystemExit, match=r"`lr` \(=0.1\) is 0.001 in"):
        run("--lr", "0.1")
