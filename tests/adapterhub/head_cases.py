"""The prediction heads of make_heads.py and test_adapterhub_heads.py, and their inputs."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

try:
    from .families import VOCAB
except ImportError:  # run as a script
    from families import VOCAB

LABELS = {"id2label": {0: "bad", 1: "good", 2: "fair"}}
THREE = {"num_labels": 3, **LABELS}
STATIC = {**THREE, "label2id": {"bad": 0, "good": 1, "fair": 2}}
ONE_LAYER = {"layers": 1, "activation_function": None}
POOLED = {**ONE_LAYER, "use_pooler": True}

# kind -> (class of transformers, function of the library, options of the flexible head)
CLASSIFIER, TAGGER, QA = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
CHOICE, MLM, CAUSAL, SEQ2SEQ = (
    AutoModelForMultipleChoice,
    AutoModelForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)
# name -> family, class of transformers, flexible head (None for that of the class), fields of the config
CASES: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "bert-static-classification": ("bert", CLASSIFIER, None, STATIC),
    "bert-static-tagging": ("bert", TAGGER, None, STATIC),
    "bert-static-qa": ("bert", QA, None, {}),
    "bert-static-choice": ("bert", CHOICE, None, {}),
    "bert-static-mlm": ("bert", MLM, None, {}),
    "roberta-static-classification": ("roberta", CLASSIFIER, None, STATIC),
    "distilbert-static-classification": ("distilbert", CLASSIFIER, None, STATIC),
    "electra-static-classification": ("electra", CLASSIFIER, None, STATIC),
    "bart-static-classification": ("bart", CLASSIFIER, None, STATIC),
    "t5-static-classification": ("t5", CLASSIFIER, None, STATIC),
    "gpt2-static-classification": ("gpt2", CLASSIFIER, None, STATIC),
    "llama-static-classification": ("llama", CLASSIFIER, None, STATIC),
    "vit-static-image": ("vit", AutoModelForImageClassification, None, STATIC),
    "bert-classification": ("bert", CLASSIFIER, ("classification", THREE), STATIC),
    "bert-pooled": ("bert", CLASSIFIER, ("classification", {**THREE, **POOLED}), STATIC),
    "bert-multilabel": ("bert", CLASSIFIER, ("classification", {**THREE, "multilabel": True}), STATIC),
    "bert-tagging": ("bert", TAGGER, ("tagging", THREE), STATIC),
    "bert-qa": ("bert", QA, ("qa", {}), {}),
    "bert-choice": ("bert", CHOICE, ("multiple_choice", {}), {}),
    "bert-choice-pooled": ("bert", CHOICE, ("multiple_choice", POOLED), {}),
    "bert-mlm": ("bert", MLM, ("masked_lm", {}), {}),
    "roberta-classification": ("roberta", CLASSIFIER, ("classification", THREE), STATIC),
    "roberta-tagging": ("roberta", TAGGER, ("tagging", THREE), STATIC),
    "roberta-choice": ("roberta", CHOICE, ("multiple_choice", {}), {}),
    "roberta-mlm": ("roberta", MLM, ("masked_lm", {}), {}),
    "xlm-roberta-classification": ("xlm-roberta", CLASSIFIER, ("classification", THREE), STATIC),
    "distilbert-classification": (
        "distilbert",
        CLASSIFIER,
        ("classification", {**THREE, "activation_function": "relu"}),
        STATIC,
    ),
    "distilbert-qa": ("distilbert", QA, ("qa", {}), {}),
    "distilbert-mlm": ("distilbert", MLM, ("masked_lm", {}), {}),
    "electra-classification": (
        "electra",
        CLASSIFIER,
        ("classification", {**THREE, "activation_function": "gelu"}),
        STATIC,
    ),
    "electra-choice": ("electra", CHOICE, ("multiple_choice", {"activation_function": "gelu"}), {}),
    "electra-mlm": ("electra", MLM, ("masked_lm", {}), {}),
    "albert-classification": ("albert", CLASSIFIER, ("classification", THREE), STATIC),
    "albert-mlm": ("albert", MLM, ("masked_lm", {"activation_function": "gelu_new"}), {}),
    "deberta-v2-classification": (
        "deberta-v2",
        CLASSIFIER,
        ("classification", {**THREE, "activation_function": "gelu"}),
        STATIC,
    ),
    "deberta-v2-mlm": ("deberta-v2", MLM, ("masked_lm", {}), {}),
    "bart-classification": ("bart", CLASSIFIER, ("classification", THREE), STATIC),
    "bart-qa": ("bart", QA, ("qa", {}), {}),
    "bart-seq2seq": ("bart", SEQ2SEQ, ("seq2seq_lm", {}), {}),
    "t5-classification": ("t5", CLASSIFIER, ("classification", THREE), STATIC),
    "t5-qa": ("t5", QA, ("qa", {}), {}),
    "t5-seq2seq": ("t5", SEQ2SEQ, ("seq2seq_lm", {}), {}),
    "gpt2-tagging": ("gpt2", TAGGER, ("tagging", THREE), STATIC),
    "gpt2-causal": ("gpt2", CAUSAL, ("causal_lm", {}), {}),
    "llama-tagging": ("llama", TAGGER, ("tagging", THREE), STATIC),
    "llama-causal": ("llama", CAUSAL, ("causal_lm", {}), {}),
    "mbart-classification": ("mbart", CLASSIFIER, ("classification", THREE), STATIC),
    "mt5-classification": ("mt5", CLASSIFIER, ("classification", THREE), STATIC),
    "deberta-classification": (
        "deberta",
        CLASSIFIER,
        ("classification", {**THREE, "activation_function": "gelu"}),
        STATIC,
    ),
    "mistral-static-classification": ("mistral", CLASSIFIER, None, STATIC),
    "gptj-causal": ("gptj", CAUSAL, ("causal_lm", {}), {}),
    "vit-image": ("vit", AutoModelForImageClassification, ("image_classification", THREE), STATIC),
    "beit-image": ("beit", AutoModelForImageClassification, ("image_classification", THREE), STATIC),
}


def head_batch(family: str, name: str) -> dict[str, Tensor]:
    """Three rows with an end of sequence each; the second has padding. Multiple choice has two answers a row."""
    generator = torch.Generator().manual_seed(3)
    if family in ("vit", "beit"):
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCAB, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[:, 6], ids[1, 4], ids[1, 5:], mask[1, 5:] = 2, 2, 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "choice" in name:
        return {key: torch.stack([value, value.flip(0)], dim=1) for key, value in inputs.items()}
    if name.endswith("seq2seq"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (3, 5), generator=generator)
    return inputs


@torch.no_grad()
def head_outputs(model: nn.Module, family: str, name: str) -> Tensor:
    """The logits of a model; those of starts and ends in one tensor."""
    result = model(**head_batch(family, name))
    if "start_logits" in result:
        return torch.stack([result.start_logits, result.end_logits]).contiguous()
    return result.logits.contiguous()
