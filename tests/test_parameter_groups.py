"""Learning rates of their own for kinds of sub-layers, in a plain optimizer and in a trainer."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from hf_peft_ext import UniPELTConfig, sublayer_parameter_groups
from hf_peft_ext.trainers import AdapterTrainer

from .backbones import BACKBONES
from .test_training import classifier

ALL = ("adapter", "prefix", "lora", "bitfit")
RATES = {"prefix": 1e-2, "gate": 2e-2, "head": 3e-3}


def names_by_rate(model, groups):
    """Learning rate -> the names of its parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {}
    for group in groups:
        rates.setdefault(group["lr"], set()).update(names[id(parameter)] for parameter in group["params"])
    return rates


def test_groups():
    """Each trainable parameter once; a gate is no part of its sub-layer."""
    model = get_peft_model(classifier(), UniPELTConfig(methods=ALL, bottleneck_size=4, task_type="SEQ_CLS"))
    rates = names_by_rate(model, sublayer_parameter_groups(model, 1e-3, **RATES, bias=5e-2))
    assert set().union(*rates.values()) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(map(len, rates.values())) == len(set().union(*rates.values()))
    assert all(name.endswith(("P_K", "P_V")) for name in rates[1e-2])
    assert all(".gate." in name for name in rates[2e-2])
    assert all("modules_to_save" in name for name in rates[3e-3])
    assert all("trained_bias" in name for name in rates[5e-2])
    assert {name.split(".")[-1] for name in rates[1e-3]} == {"A", "B", "weight", "bias"}
    torch.optim.AdamW(sublayer_parameter_groups(model, 1e-3, **RATES))


def test_on_a_lora_of_peft():
    model = get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    rates = names_by_rate(model, sublayer_parameter_groups(model, 1e-3, head=1e-2))
    assert all("lora_" in name for name in rates[1e-3])
    assert all("modules_to_save" in name for name in rates[1e-2])


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"lr": 0.0}, "`lr` (=0.0) must be a positive number."),
        ({"prefix": -1.0}, "`prefix` (=-1.0) must be a positive number."),
        ({"prefixes": 1e-2}, "`learning rates` (=['prefixes']) must be of bottleneck, prefix, low_rank,"),
        ({"head": 1e-2}, "`head` (=0.01) is the rate of parameters that this model does not train; it trains"),
    ],
)
def test_errors(rates, message):
    model = get_peft_model(BACKBONES["bert"].build(), UniPELTConfig(bottleneck_size=4))
    with pytest.raises(ValueError, match=re.escape(message)):
        sublayer_parameter_groups(model, **{"lr": 1e-3, **rates})


def trainer(tmp_path, **kwargs):
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, weight_decay=0.1, report_to="none", use_cpu=True)
    return AdapterTrainer(args=args, **kwargs)


def test_in_a_trainer(tmp_path):
    """The rates of the groups, and weight decay as Trainer gives it: none for biases."""
    config = UniPELTConfig(bottleneck_size=4, task_type="SEQ_CLS")
    trained = trainer(tmp_path, model=classifier(), peft_config=config, sublayer_rates=RATES)
    plain = trainer(tmp_path, model=classifier(), peft_config=config)
    optimizer = trained.create_optimizer()
    assert trained.create_optimizer() is optimizer
    rates = names_by_rate(trained.model, optimizer.param_groups)
    assert all(name.endswith(("P_K", "P_V")) for name in rates[1e-2])
    assert all(".gate." in name for name in rates[2e-2])
    totals = [
        {decay: sum(p.numel() for g in o.param_groups if g["weight_decay"] == decay for p in g["params"])
         for decay in (0.1, 0.0)}
        for o in (optimizer, plain.create_optimizer())
    ]  # fmt: skip
    assert totals[0] == totals[1]


def test_refused_by_a_trainer(tmp_path):
    config = UniPELTConfig(bottleneck_size=4, methods=("lora",), task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=re.escape("`prefix` (=0.01) is the rate of parameters that this model")):
        trainer(tmp_path, model=classifier(), peft_config=config, sublayer_rates={"prefix": 1e-2})
    model = get_peft_model(classifier(), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="must be None beside `optimizers`"):
        trainer(tmp_path, model=model, sublayer_rates={"gate": 1e-2}, optimizers=(optimizer, None))
