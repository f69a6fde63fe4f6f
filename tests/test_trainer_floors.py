"""The classes of ours between a trainer and transformers', and how often they override a method."""

import pytest
from transformers import Trainer

from hf_peft_ext import trainers

PUBLIC = (
    *("AdapterTrainer", "AdapterSeq2SeqTrainer", "AdapterSFTTrainer", "TFewTrainer", "BridgeTrainer"),
    *("SoftLabelTrainer", "AdapterSoftLabelTrainer", "AdaMixTrainer", "AdapterEmbeddingTrainer"),
)
OF_EXTRAS = {"AdapterSFTTrainer": "trl", "AdapterEmbeddingTrainer": "sentence_transformers"}


def floors(cls):
    """The classes of ours that a trainer is made of, itself included."""
    return [base for base in cls.__mro__ if base.__module__.startswith("hf_peft_ext.")]


def test_the_list_is_complete():
    classes = [value for value in vars(trainers).values() if isinstance(value, type) and issubclass(value, Trainer)]
    assert {cls.__name__ for cls in classes} - {*OF_EXTRAS} == set(PUBLIC) - {*OF_EXTRAS}


@pytest.mark.parametrize("name", PUBLIC)
def test_at_most_four_floors(name):
    """Four classes at most, the trainer included, and no method on more than two of them."""
    if name in OF_EXTRAS:
        pytest.importorskip(OF_EXTRAS[name])
    classes = floors(getattr(trainers, name))
    assert len(classes) <= 4, [cls.__name__ for cls in classes]
    methods = [method for cls in classes for method, value in vars(cls).items() if callable(value)]
    overridden = {method: methods.count(method) for method in methods if methods.count(method) > 2}
    assert not overridden
