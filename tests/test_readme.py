"""What the README shows runs as it stands, and its table of methods says what the configs do; the demo's data hold."""

import csv
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import hf_peft_ext
from hf_peft_ext import ComposedConfig, Placement
from hf_peft_ext.tuners.bottleneck import STYLES

from .adapterhub.families import build

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


# 2026-11: Trainer's data loader asks for pinned memory wherever it runs
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=[block.split("\n")[0] for block in BLOCKS])
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "my_adapter" in block:
        build("bert").save_pretrained("my_model")
        with zipfile.ZipFile(ROOT / "tests" / "adapterhub" / "bert.zip") as archive:
            archive.extractall()
        Path("unipelt").rename("my_adapter")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_table_of_methods():
    """Each row's crosses are the sub-layers that the config places."""
    rows = re.findall(r"^\| `(\w+?)(?:\(style=\"(\w+)\"\))?` \|(.*)\|$", README, flags=re.MULTILINE)
    assert [style for _, style, _ in rows if style] == list(STYLES)
    for name, style, cells in rows:
        marks = [cell.strip() for cell in cells.split("|")][:5]
        if name == "ComposedConfig":
            placement = Placement("bias", "bias")
            assert ComposedConfig(placements=[placement]).to_placements() == [placement]
            continue
        config = getattr(hf_peft_ext, name)(**({"style": style} if style else {}))
        if name == "S4Config":  # which has its sub-layers where it meets a model
            with torch.device("meta"):
                config = config.resolved(BertModel(BertConfig()))
        placed = {p.sublayer for p in config.to_placements()}
        gated = any(p.gate for p in config.to_placements())
        expected = [kind in placed for kind in ("bottleneck", "low_rank", "prefix", "bias")] + [gated]
        assert [mark == "x" for mark in marks] == expected, name


def test_demo_data():
    """Eight intents, as many rows of each in both splits, no message twice."""
    with (ROOT / "examples" / "data" / "support_messages.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    counts = Counter((row["intent"], row["split"]) for row in rows)
    assert len(counts) == 16
    assert set(counts.values()) == {40}
    assert len({re.sub(r"\W+", " ", row["text"].lower()) for row in rows}) == len(rows)
