"""The methods of the study of ranks: equal numbers of parameters, on a model of MiniLM's sizes without weights."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig

from hf_peft_ext.recipes.tasks import CONFIGS
from hf_peft_ext.search.search import adapter_parameters

STUDIES = Path(__file__).parents[1] / "examples" / "studies"
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(STUDIES)
    for name in ("rank_budget", "which_method", "runs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("rank_budget")
    BertConfig(vocab_size=50, **SIZES).save_pretrained(tmp_path)
    monkeypatch.setattr(module, "find_model", lambda name: str(tmp_path))
    return module


def parameters(method):
    fields = {key: value for key, value in method.config.items() if key != "peft_type"}
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=50, **SIZES))
    return adapter_parameters(
        get_peft_model(model, CONFIGS[method.config["peft_type"]](task_type="SEQ_CLS", **fields))
    )


def test_modules_have_one_budget(study):
    methods = study.module_methods()
    assert {name: parameters(method) for name, method in methods.items()} == dict.fromkeys(methods, study.BUDGET)


def test_draws_have_the_parameters_of_lora(study):
    methods = study.rank_methods()
    whole = parameters(methods["lora all"])
    counts = [parameters(method) for name, method in methods.items() if name.startswith("draw")]
    assert len(counts) == study.DRAWS
    assert all(whole - 768 < count <= whole for count in counts)
    patterns = [method.config["rank_pattern"] for name, method in methods.items() if name.startswith("draw")]
    assert len({tuple(pattern.values()) for pattern in patterns}) == study.DRAWS


def test_draws_are_reported_as_one_method(study):
    cells = {"trec": {"LoRA": {"1": 70.0}, "random ranks 0": {"1": 60.0}, "random ranks 1": {"1": 62.0}}}
    joined = study.with_draws_as_one(cells)
    assert joined == {"trec": {"LoRA": {"1": 70.0}, "random ranks, mean of 2 draws": {"1": 61.0}}}
