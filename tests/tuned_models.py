"""Tiny models with an adapter, and the marks of tests that need transformers' own adapter methods."""

import peft
import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from .backbones import BACKBONES, SPECIAL, VOCAB, output
from .methods import METHODS, randomise

# transformers 5.24's own adapter methods ask for peft 0.22, which was not there when this was written (2026-11)
asked = Version(getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0"))
served = Version(peft.__version__) >= asked
adds_adapters = pytest.mark.skipif(not served, reason=f"transformers' add_adapter asks for peft {asked}")
# transformers' own add_adapter of a second adapter makes peft say so
several = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
every_method = pytest.mark.parametrize("method", METHODS)
families = pytest.mark.parametrize("backbone", ["bert", "llama", "t5"])


def tuned(method, backbone, **kwargs):
    """A PeftModel with a random adapter, inputs, and its outputs."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), METHODS[method](**kwargs))
    randomise(model)
    model.eval()
    with torch.no_grad():
        return model, family.inputs(), output(model, family.inputs())


def classifier(model_type="bert", seed=0):
    """A tiny classifier of three classes."""
    family = BACKBONES[model_type]
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, num_labels=3, **SPECIAL, **family.config)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval(), family.inputs()
