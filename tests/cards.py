"""Adapters and a training record for the tests of cards."""

from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_peft_ext import BitFitConfig, IntrinsicConfig, LadderConfig, MAMConfig, S4Config, UniPELTConfig
from hf_peft_ext.hub_cards import DatasetRecord, Result, TrainingRecord

from .backbones import BACKBONES, SPECIAL, VOCAB
from .methods import randomise

BASE = "acme/tiny-bert"
LABELS = ["refund", "lost card", "other"]


def classifier():
    config = AutoConfig.for_model("bert", vocab_size=VOCAB, **SPECIAL, **BACKBONES["bert"].config)
    config.id2label = dict(enumerate(LABELS))
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


ADAPTERS = {
    "unipelt": lambda: get_peft_model(
        classifier(), UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, task_type="SEQ_CLS")
    ),
    "mam": lambda: get_peft_model(
        BACKBONES["t5"].build(), MAMConfig(num_virtual_tokens=4, bottleneck_size=4, task_type="SEQ_2_SEQ_LM")
    ),
    "s4": lambda: get_peft_model(
        classifier(),
        S4Config(grouping=[1, 1], strategies=[["adapter", "lora"], ["bitfit"]], budget=0.05, task_type="SEQ_CLS"),
    ),
    "bitfit": lambda: get_peft_model(BACKBONES["gpt2"].build(), BitFitConfig()),
    "ladder": lambda: get_peft_model(BACKBONES["qwen2"].build(), LadderConfig(r=4, task_type="CAUSAL_LM")),
    "intrinsic": lambda: get_peft_model(classifier(), IntrinsicConfig(d=200, variant="layer", task_type="SEQ_CLS")),
    "ia3": lambda: get_peft_model(BACKBONES["llama"].build(), IA3Config(task_type="CAUSAL_LM")),
    "lora": lambda: get_peft_model(BACKBONES["roberta"].build(), LoraConfig(task_type="FEATURE_EXTRACTION", r=2)),
}
OURS = ("unipelt", "mam", "s4", "bitfit", "ladder", "intrinsic")


def saved(folder: Path, name: str, base: str | None = BASE) -> PeftModel:
    """An adapter with weights that matter, saved as if its base model came from the Hub; without a card."""
    model = ADAPTERS[name]()
    randomise(model)
    model.get_base_model().name_or_path = base or ""
    model.save_pretrained(folder)
    if name in OURS:  # peft's own types keep the blank card that peft gives them
        for file in ("README.md", "training_record.json"):
            (folder / file).unlink(missing_ok=True)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "text", "A", "to", "classify", "."])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def full_record() -> TrainingRecord:
    """A record in which nothing is missing."""
    glue = {"dataset": "nyu-mll/glue", "split": "validation"}
    return TrainingRecord(
        base_model=BASE,
        base_model_revision="a" * 40,
        datasets=[
            DatasetRecord("nyu-mll/glue", "mrpc", "train", 3668, "b" * 40, "0123abcd", on_hub=True, used_for="train"),
            DatasetRecord("own messages", split="test", rows=320, used_for="eval"),
        ],
        labels=LABELS,
        results=[
            Result("accuracy", 0.68382, method="base", **glue),
            Result("accuracy", 0.85312, 0.01234, 3, "adapter", **glue),
            Result("accuracy", 0.84121, 0.0111, 3, "lora", **glue),
            Result("f1", 0.89, method="adapter", dataset="own messages", split="test"),
        ],
        trainable_parameters=3507,
        total_parameters=22_713_216,
        peak_memory=3 * 2**30 // 2,
        step_time=0.1173,
        train_time=245.0,
        gates={f"{i}.{name}": 0.1 + i / 5 for i in range(2) for name in ("attention_prefix", "query_low_rank")},
        history=[{"step": 10 * i, "loss": 2 / i, "eval_loss": 2.2 / i, "nll": 1 / i} for i in range(1, 6)],
        loss_terms=["nll"],
        hyperparameters={"learning_rate": 5e-4},
        recipe={"model": BASE, "method": "unipelt", "training": {"learning_rate": 5e-4, "max_steps": 50}},
        command="hf-peft-ext train recipe.yaml learning_rate=5e-4",
        seeds=[0, 1, 2],
        versions={"peft": "0.21.2", "torch": "2.13.0+cpu"},
        hardware="2 x AMD EPYC",
        quantization="4-bit NF4, double quantisation",
        language=["en"],
        license="apache-2.0",
        trainer="Adapter",
        tags=["support"],
    )
