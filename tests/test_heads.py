"""Every PeftModelFor... class on several families: the head is trained and saved beside the adapter, reloaded equal.

For the methods whose config is changed when it meets a model, and for the ladder, which needs no pooler.
"""

import pytest
import torch
import transformers
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, TaskType, get_peft_model
from transformers import AutoConfig

from hf_peft_ext import LadderConfig, S4Config, TFewConfig

from .backbones import BACKBONES

AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
METHODS = {
    "tfew": TFewConfig,
    "s4": lambda **kw: S4Config(strategies=[("adapter", "lora"), ("prefix", "lora")], budget=0.1, **kw),
    "ladder": lambda **kw: LadderConfig(r=4, **kw),
}
FAMILIES = ("bert", "roberta", "electra", "gpt2", "llama", "qwen2", "t5", "bart")
every_method = pytest.mark.parametrize("method", METHODS)
CASES = [
    (task, family)
    for task in AUTO
    for family in FAMILIES
    if type(AutoConfig.for_model(BACKBONES[family].model_type)) in AUTO[task]._model_mapping
    and (task != "CAUSAL_LM" or BACKBONES[family].kind == "decoder")
]


def built(task, family):
    backbone = BACKBONES[family]
    sizes = {**backbone.config, "vocab_size": 60, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    return AUTO[task].from_config(AutoConfig.for_model(backbone.model_type, **sizes)).eval()


def given(task, family):
    """Inputs that every class takes; T5's and BART's classifiers read the last token that ends a text."""
    inputs = BACKBONES[family].inputs(padding="none")
    inputs["input_ids"][:, -1] = 2
    if task not in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        inputs.pop("decoder_input_ids", None)
    return inputs


def main_output(model, inputs):
    found = model(**inputs)
    names = ("logits", "start_logits", "last_hidden_state")
    return next(found[name] for name in names if name in found)


def alter(model):
    """As if it had been trained: every trained number moved a little."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model.eval()


def test_every_class_has_a_case():
    assert {*AUTO} == {*MODEL_TYPE_TO_PEFT_MODEL_MAPPING} == {task.value for task in TaskType}


@every_method
@pytest.mark.parametrize(("task", "family"), CASES)
def test_heads(method, task, family, tmp_path):
    # peft does not know the name that the heads of encoder-decoders have
    own = (
        {"modules_to_save": ["classification_head"]}
        if BACKBONES[family].kind == "seq2seq" and task == "SEQ_CLS"
        else {}
    )
    config, inputs = METHODS[method](task_type=task, **own), given(task, family)
    model = get_peft_model(built(task, family), config)
    assert type(model) is MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    assert model.peft_config["default"] is config  # peft goes on with the object that it was given
    main_output(model, inputs).float().square().mean().backward()
    heads = [p for name, p in model.named_parameters() if "modules_to_save.default" in name]
    assert bool(heads) == (task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"))
    assert all(p.grad is not None for p in heads)
    alter(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(built(task, family), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(main_output(again, inputs), main_output(model, inputs))


@pytest.mark.parametrize("method", ["tfew", "s4"])
@pytest.mark.parametrize("task", ["TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_one_config_for_two_models(method, task):
    """The second model, of other modules or another depth, gets a config of its own; the first keeps its."""
    other = "distilbert" if method == "tfew" else "bert"
    fresh = lambda: METHODS[method](task_type=task)  # noqa: E731
    config = fresh()
    first = get_peft_model(built(task, "bert"), config)
    before = config.to_dict()
    second = get_peft_model(built(task, other), config).peft_config["default"]
    assert first.peft_config["default"] is config is not second
    alone = get_peft_model(built(task, other), fresh()).peft_config["default"].to_dict()
    for found, expected in ((config.to_dict(), before), (second.to_dict(), alone)):
        heads = [set(fields.pop("modules_to_save") or ()) for fields in (found, expected)]
        assert heads[0] == heads[1]
        assert found == expected
