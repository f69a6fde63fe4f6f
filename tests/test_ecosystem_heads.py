"""Classification heads and `modules_to_save`: trained, saved, loaded, and one for each row of a batch."""

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file

from .backbones import BACKBONES, output
from .methods import METHODS, randomise
from .tuned_models import classifier

# heads


def heads(model):
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


@pytest.mark.parametrize("backbone", ["bert", "roberta", "distilbert", "llama", "gpt2"])
@pytest.mark.parametrize("method", ["unipelt", "mam", "bitfit"])
def test_classification_head_is_saved(method, backbone, tmp_path):
    """TaskType.SEQ_CLS trains, saves and reloads the head beside the adapter."""
    base, inputs = classifier(backbone)
    model = get_peft_model(base, METHODS[method](task_type=TaskType.SEQ_CLS))
    randomise(model)
    (head, *_) = heads(model)
    assert all(p.requires_grad for p in head.modules_to_save["default"].parameters())
    assert not any(p.requires_grad for p in head.original_module.parameters())
    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("classifier" in key or "score" in key for key in saved)
    again = PeftModel.from_pretrained(classifier(backbone, seed=1)[0], tmp_path).eval()
    for mine, others in zip(heads(model), heads(again), strict=True):
        for a, b in zip(mine.modules_to_save.parameters(), others.modules_to_save.parameters(), strict=True):
            assert torch.equal(a, b)
    again = PeftModel.from_pretrained(classifier(backbone)[0], tmp_path).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
        with again.disable_adapter():
            assert torch.equal(again(**inputs).logits, classifier(backbone)[0](**inputs).logits)


def test_transformers_loads_the_head_too(tmp_path):
    """A SEQ_CLS adapter loads through transformers with its head, no key missing and none left over."""
    base, inputs = classifier()
    model = get_peft_model(base, METHODS["unipelt"](task_type=TaskType.SEQ_CLS))
    randomise(model)
    model.eval().save_pretrained(tmp_path)
    bare, _ = classifier()
    info = bare.load_adapter(str(tmp_path), adapter_name="task")
    assert not info.missing_keys
    assert not info.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(bare.eval()(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_modules_to_save_are_trained_whole():
    """modules_to_save beside an adapter: both get gradients, nothing else does."""
    model = get_peft_model(BACKBONES["llama"].build(), METHODS["unipelt"](modules_to_save=["lm_head"]))
    output(model, BACKBONES["llama"].inputs()).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head.modules_to_save.default" in name for name in trained)
    assert any("sublayer_of.default" in name for name in trained)
    assert all(".default." in name for name in trained)


@pytest.mark.parametrize("backbone", ["bert", "distilbert", "llama"])  # peft mixes heads that are linear layers
def test_each_row_has_its_own_head(backbone):
    """A batch with `adapter_names` uses each row's adapter, and each adapter's own head."""
    model, inputs = classifier(backbone)
    model = get_peft_model(model, METHODS["unipelt"](task_type=TaskType.SEQ_CLS))
    model.add_adapter("other", METHODS["unipelt_aplb"](task_type=TaskType.SEQ_CLS))
    randomise(model)
    randomise(model, "other", seed=5)
    model.eval()
    with torch.no_grad():
        alone = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = model(**inputs).logits
        with model.disable_adapter():
            alone["__base__"] = model(**inputs).logits
        names = ["other", "__base__", "default"]
        mixed = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
        assert all((mixed[row] - alone[other][row]).abs().max() > 1e-3 for other in alone if other != name)
