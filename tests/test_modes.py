"""Modes of a model inside a `with` block, and that all of them are put back, also after an error."""

import pytest
from torch import nn

from hf_peft_ext.model.modes import evaluating, frozen, preserve_requires_grad


@pytest.fixture
def model():
    """One part in evaluation, one parameter frozen."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    model[1].eval()
    model[0].bias.requires_grad = False
    return model


def modes(model):
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("error", [None, KeyError])
def test_modes_are_put_back(model, error):
    before = modes(model)
    for change in (evaluating, frozen, preserve_requires_grad):
        try:
            with change(model):
                if change is preserve_requires_grad:
                    model.requires_grad_(True)
                else:
                    assert not any(modes(model)[0])
                    assert any(modes(model)[1]) == (change is evaluating)
                if error:
                    raise error
        except KeyError:
            assert error is KeyError
        assert modes(model) == before
