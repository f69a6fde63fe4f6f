"""Batches whose rows use different (IA)^3 adapters: each row against a batch with its adapter alone."""

import copy
import re

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from hf_peft_ext import TFewConfig, extend_peft

from .backbones import BACKBONES, output
from .test_tfew import SWITCH, randomise, tuned, vectors

pytestmark = pytest.mark.filterwarnings("ignore:.*leaves parts of the FFN as they are:UserWarning")
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
generators = pytest.mark.parametrize("backbone", [name for name, b in BACKBONES.items() if b.kind != "encoder"])
NAMES = ["other", "__base__", "default"]


def with_two(backbone, **kwargs):
    """A model with the adapters default, everywhere, and other, in one layer."""
    model, inputs = tuned(backbone, **kwargs)
    model.add_adapter("other", TFewConfig(layers_to_transform=[1], targets=["value", "ffn_output"]))
    model.set_requires_grad(["default", "other"])
    randomise(model, "other", seed=7)
    return model.eval(), inputs


def alone(model, run):
    """Adapter -> what `run` gives with it for the whole batch."""
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        found[name] = run()
    with model.disable_adapter():
        found["__base__"] = run()
    model.set_adapter("default")
    return found


def visible(inputs, row):
    """Which tokens of a row's output count."""
    shown = (
        inputs["attention_mask"] if "decoder_input_ids" not in inputs else torch.ones_like(inputs["decoder_input_ids"])
    )
    return shown[row].bool()


@every_backbone
@torch.no_grad()
def test_each_row_has_its_adapter(backbone):
    """The rows of a mixed batch are those of the batches of each adapter; afterwards nothing is left behind."""
    model, inputs = with_two(backbone)
    expected = alone(model, lambda: output(model, inputs))
    mixed = output(model, inputs, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        tokens = visible(inputs, row)
        torch.testing.assert_close(mixed[row][tokens], expected[name][row][tokens], rtol=1e-4, atol=1e-4)
        for other in set(NAMES) - {name}:
            assert (mixed[row][tokens] - expected[other][row][tokens]).abs().max() > 1e-3
    assert torch.equal(output(model, inputs), expected["default"])


@every_backbone
def test_gradients_of_a_mixed_batch(backbone):
    """In training too: each adapter gets the gradient of its own rows."""
    model, inputs = with_two(backbone)
    probe = torch.randn(output(model, inputs).shape)
    for row in range(len(NAMES)):
        probe[row][~visible(inputs, row)] = 0

    def gradients(rows, **kwargs):
        model.zero_grad()
        ((output(model, inputs, **kwargs) * probe)[rows]).sum().backward()
        return {
            name: {path: vector.grad for path, vector in vectors(model, name).items()} for name in ("default", "other")
        }

    mixed = gradients(slice(None), adapter_names=NAMES)
    for name in ("default", "other"):
        model.set_adapter(name)
        expected = gradients(NAMES.index(name))[name]
        assert mixed[name].keys() == expected.keys()
        for path, gradient in expected.items():
            torch.testing.assert_close(mixed[name][path], gradient, rtol=1e-3, atol=1e-4)


def test_training_steps_on_mixed_batches():
    """Steps on mixed batches, in training mode, move each adapter as steps on its own rows alone do."""
    model, inputs = with_two("t5", dropout_rate=0.0)
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    probe = torch.randn(output(model, inputs).shape)

    def train(trained, name, rows, **kwargs):
        trained.train().set_adapter(name)
        trained.set_requires_grad(["default", "other"])
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            (output(trained, inputs, **kwargs) * probe)[rows].sum().backward()
            optimizer.step()

    train(model, "default", slice(None), adapter_names=NAMES)
    for name in ("default", "other"):
        train(twin, name, NAMES.index(name))
    for name in ("default", "other"):
        for path, vector in vectors(model, name).items():
            torch.testing.assert_close(vector, vectors(twin, name)[path], rtol=1e-4, atol=1e-5)
            assert (vector != vectors(start, name)[path]).any()


@generators
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation(backbone, beams):
    """Greedy and beam search, with padding on the left: each row's tokens are those of its adapter alone."""
    model, _ = with_two(backbone)
    randomise(model, std=2.0)
    inputs = BACKBONES[backbone].inputs(padding="left")
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    expected = alone(model, lambda: model.generate(**inputs, **options))
    mixed = model.generate(**inputs, **options, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed[row], expected[name][row])
    assert any((expected["default"][row] != expected["__base__"][row]).any() for row in range(len(NAMES)))


def test_adapters_of_peft_itself(tmp_path):
    """Stock IA3Config adapters, loaded from files, at other modules than ours; and a head of its own for each."""
    family = BACKBONES["bert"]

    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(family.build().config).eval()

    extend_peft()
    stock = IA3Config(
        task_type="SEQ_CLS", target_modules=["query", "intermediate.dense"], feedforward_modules=["intermediate.dense"]
    )
    for name, config in (("stock", stock), ("ours", TFewConfig(task_type="SEQ_CLS"))):
        model = get_peft_model(base(), config)
        randomise(model)
        with torch.no_grad():
            model.classifier.modules_to_save["default"].weight.normal_()
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(base(), tmp_path / "stock", adapter_name="stock").eval()
    model.load_adapter(tmp_path / "ours", "ours")
    inputs, names = family.inputs(), ["ours", "stock", "__base__"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        expected = {}
        for name in ("ours", "stock"):
            model.set_adapter(name)
            expected[name] = model(**inputs).logits
        expected["__base__"] = base()(**inputs).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-4, atol=1e-5)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


@torch.no_grad()
def test_convolutions():
    """(IA)^3 of peft on convolutions: channels are scaled row by row."""
    config = {"target_modules": ["first", "second"], "feedforward_modules": ["second"]}
    extend_peft()
    model = get_peft_model(Convolutions(), IA3Config(**config)).eval()
    model.add_adapter("other", IA3Config(**config))
    for seed, name in enumerate(("default", "other")):
        randomise(model, name, seed)
    x = torch.randn(3, 3, 8, 8)
    expected = alone(model, lambda: model(x))
    mixed = model(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], expected[name][row])


def test_half_precision():
    """Vectors in float32 on a bfloat16 model, as peft has them: rows as alone, to the bit."""
    family = BACKBONES["llama"]
    model = get_peft_model(family.build().to(torch.bfloat16), TFewConfig()).eval()
    randomise(model)
    assert {vector.dtype for vector in vectors(model).values()} == {torch.float32}
    with torch.no_grad():
        alike = output(model, family.inputs(), adapter_names=["default"] * 3)
        assert torch.equal(alike, output(model, family.inputs()))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default", "x", "__base__"], "`adapter_names` holds ['x'], but the adapters are ['default', 'other']."),
        (["default"], "`adapter_names` (=['default']) must have one name for each of the 3 rows."),
        ([], "`adapter_names` (=[]) must have one name for each of the 3 rows."),
    ],
)
def test_bad_names(names, message):
    model, inputs = with_two("llama")
    for run in (model, model.generate):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**inputs, adapter_names=names)
    assert not any(module._forward_hooks for module in model.modules())


def test_merged_adapters_are_refused():
    model, inputs = with_two("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="`adapter_names` cannot be used while adapters are merged; unmerge them"):
        model(**inputs, adapter_names=NAMES)


def test_training_under_gradient_checkpointing_is_refused():
    """The blocks would be computed again without the names. In evaluation all is well."""
    model, inputs = with_two("llama")
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="`adapter_names` cannot be trained under gradient checkpointing"):
        model.train()(**inputs, adapter_names=NAMES)
    with torch.no_grad():
        assert model.eval()(**inputs, adapter_names=NAMES).logits.isfinite().all()


def test_an_error_inside_leaves_nothing_behind():
    model, inputs = with_two("llama")
    with torch.no_grad():
        expected = output(model, inputs)
        with pytest.raises(IndexError):
            model(input_ids=inputs["input_ids"] + 10_000, adapter_names=NAMES)
        assert torch.equal(output(model, inputs), expected)


def test_routed_experts_are_refused():
    """They read tokens of any row; with an adapter that leaves them alone, all is well."""
    config = AutoConfig.for_model("switch_transformers", **SWITCH)
    model = get_peft_model(AutoModelForSeq2SeqLM.from_config(config), TFewConfig()).eval()
    model.add_adapter("attention", TFewConfig(targets=["key", "value"]))
    inputs = BACKBONES["t5"].inputs()
    message = (
        r"`adapter_names` \(=\['default', .*\) cannot be mixed at encoder\..*\.experts\..*\.wo, which reads single"
    )
    with pytest.raises(ValueError, match=message):
        model(**inputs, adapter_names=["default", "attention", "__base__"])
    with torch.no_grad():
        assert model(**inputs, adapter_names=["attention", "attention", "__base__"]).logits.isfinite().all()
