"""The README's table of methods says what the configs do; the demo's data hold. Its code runs in test_docs.py."""

import csv
import re
from collections import Counter
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import hf_peft_ext
from hf_peft_ext import ComposedConfig, Placement
from hf_peft_ext.papers import PAPERS, STOCK_PAPERS
from hf_peft_ext.tuners.bottleneck import STYLES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_methods():
    """Every config has a row: its crosses are the sub-layers that it places, its paper is one of the method's."""
    rows = re.findall(r"^\| `(\w+?)(?:\(style=\"(\w+)\"\))?` \|(.*)\|$", README, flags=re.MULTILINE)
    assert [style for _, style, _ in rows if style] == list(STYLES)
    assert {name for name, _, _ in rows} == {name for name in vars(hf_peft_ext) if name.endswith("Config")}
    for name, style, cells in rows:
        *marks, choose_when, paper = [cell.strip() for cell in cells.split("|")]
        assert choose_when
        if name == "ComposedConfig":
            placement = Placement("bias", "bias")
            assert ComposedConfig(placements=[placement]).to_placements() == [placement]
            continue
        config = getattr(hf_peft_ext, name)(**({"style": style} if style else {}))
        papers = PAPERS[config.method] if hasattr(config, "method") else STOCK_PAPERS["ia3"]
        assert any(f"({known.url})" in paper for known in papers), name
        if name == "S4Config":  # which has its sub-layers where it meets a model
            with torch.device("meta"):
                config = config.resolved(BertModel(BertConfig()))
        placements = config.to_placements() if hasattr(config, "to_placements") else []  # (IA)^3 and ladders have none
        placed = {p.sublayer for p in placements}
        gated = any(p.gate for p in placements)
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
