"""Thin copies: r = 1 against the large model itself, cut weights against loops over the kept units written out for each
family, saved copies against what transformers loads, and the errors.
"""

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5EncoderModel,
)

from hf_peft_ext.pruning import thin_copy

from .backbones import BACKBONES, Backbone, output

QWEN3 = Backbone("decoder", "qwen3", {**BACKBONES["qwen2"].config, "head_dim": 16})
FAMILIES = {
    **{name: BACKBONES[name] for name in ("bert", "roberta", "gpt2", "t5", "llama", "qwen2", "mistral")},
    "qwen3": QWEN3,
    "t5, gated": Backbone("seq2seq", "t5", {**BACKBONES["t5"].config, "feed_forward_proj": "gated-gelu"}),
    "llama, tied": Backbone("decoder", "llama", {**BACKBONES["llama"].config, "tie_word_embeddings": True}),
    "llama, biases": Backbone(
        "decoder", "llama", {**BACKBONES["llama"].config, "attention_bias": True, "mlp_bias": True}
    ),
}
HEADS = {
    "bert": [BertForMaskedLM, BertForSequenceClassification],
    "roberta": [RobertaForMaskedLM, RobertaForSequenceClassification],
    "gpt2": [GPT2ForSequenceClassification],
    "llama": [LlamaForSequenceClassification],
    "t5": [T5EncoderModel],
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def lively(model):
    """Norms and biases that differ from channel to channel, so that a wrong one is noticed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def build(name):
    return lively(FAMILIES[name].build())


@every_family
@pytest.mark.parametrize("reading", ["width", "parameters"])
def test_nothing_dropped_is_the_model(name, reading):
    model, inputs = build(name), FAMILIES[name].inputs()
    thin = thin_copy(model, 1, reading).model
    assert type(thin) is type(model)
    assert torch.equal(output(thin, inputs), output(model, inputs))
    assert thin.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(("name", "head"), [(name, head) for name, heads in HEADS.items() for head in heads])
def test_nothing_dropped_is_the_model_with_a_head(name, head):
    torch.manual_seed(0)
    model = lively(head(BACKBONES[name].build().config))
    inputs = Backbone("encoder", "", {}).inputs()
    assert torch.equal(output(thin_copy(model, 1).model, inputs), output(model, inputs))
    assert output(thin_copy(model, 2).model, inputs).isfinite().all()
