"""Several adapters of one model at once: stacked, averaged, side by side in one batch. Each against its formula."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_peft_ext import (
    AttentionFusionConfig,
    BitFitConfig,
    BottleneckConfig,
    LadderConfig,
    LayerPrefixConfig,
    SparseConfig,
    TFewConfig,
    UniPELTConfig,
)

from .backbones import BACKBONES, output
from .methods import ALL, VARIANTS, randomise
from .tuned_models import classifier

EVERY = [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in ALL]
FAMILIES = pytest.mark.parametrize("backbone", ["bert", "t5", "gpt2", "llama"])


def adapted(backbone, first, second=None, names=("first", "second"), **kwargs):
    """A model with two adapters of random weights."""
    model = get_peft_model(BACKBONES[backbone].build(), first(**kwargs), adapter_name=names[0])
    model.add_adapter(names[1], (second or first)(**kwargs))
    for seed, name in enumerate(names):
        randomise(model, name, seed)
    return model.eval()


def only(model, names, inputs, **kwargs):
    with torch.no_grad():
        if names is not None:
            model.base_model.set_adapter(names)
        return output(model, inputs, **kwargs)


# Stacks


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("order", [["first", "second"], ["second", "first"]])
def test_stack(style, order):
    """Sequential adapters: the second reads what the first has made of the module's output."""
    model, inputs = adapted("bert", lambda: BottleneckConfig(style=style, r=4)), BACKBONES["bert"].inputs()
    block = model.get_base_model().encoder.layer[1]
    layers = dict(block.output.dense.named_children())
    sublayers = next(iter(layers.values())).sublayer_of
    seen = {}
    block.output.register_forward_hook(lambda module, args, result: seen.update(x=args, y=result))
    only(model, order, inputs)
    h, x = seen["x"]  # of the FFN, and the residual
    with torch.no_grad():
        norm = block.output.LayerNorm
        y = torch.nn.functional.linear(h, block.output.dense.weight, block.output.dense.bias)
        if style == "houlsby":
            for name in order:
                y = y + sublayers[name](y)
            expected = norm.forward(y + x)
        else:
            s = y + x
            for name in order:
                s = s + sublayers[name](norm.forward(s))
            expected = norm.forward(s)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-5, atol=1e-5)


@FAMILIES
def test_stack_has_an_order(backbone):
    """Sequential adapters do not commute, parallel ones do; an adapter alone is as before."""
    inputs = BACKBONES[backbone].inputs()
    for style, commutes in (("houlsby", False), ("parallel", True)):
        model = adapted(backbone, lambda style=style: BottleneckConfig(style=style, r=4))
        there, back = (only(model, names, inputs) for names in (["first", "second"], ["second", "first"]))
        assert torch.allclose(there, back, atol=1e-4) is commutes
        model.set_adapter("first")
        alone = output(model, inputs)
        assert torch.equal(only(model, ["first"], inputs), alone)
        assert (there - alone).abs().max() > 1e-3


def test_stack_is_trained():
    """Both adapters of a stack are trained, neither in inference mode."""
    model, inputs = adapted("bert", lambda: BottleneckConfig(r=4)), BACKBONES["bert"].inputs()
    model.base_model.set_adapter(["first", "second"])
    output(model, inputs).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".sublayer_of." in name}
    model.base_model.set_adapter(["first", "second"], inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_stack_of_methods():
    """Adapters of different methods stack too; with a bias on the norm that the second reads behind."""
    model = adapted("bert", BitFitConfig, lambda: BottleneckConfig(style="pfeiffer", r=4), names=("bias", "adapter"))
    model.add_adapter("more", BottleneckConfig(style="pfeiffer", r=4))
    inputs = BACKBONES["bert"].inputs()
    both = only(model, ["bias", "adapter"], inputs)
    assert torch.equal(only(model, ["bias", "adapter", "more"], inputs), both)  # untrained, it adds nothing


# Averages


@pytest.mark.parametrize("method", EVERY)
def test_weighted(method, tmp_path):
    """An adapter's combination with itself is itself; the weights are sums; it is saved and loaded as any adapter."""
    model, inputs = adapted("bert", ALL[method]), BACKBONES["bert"].inputs()
    model.set_adapter("first")
    with torch.no_grad():
        expected = output(model, inputs)
    model.add_weighted_adapter(["first", "first"], [0.25, 0.75], "same")
    model.add_weighted_adapter(["first", "second"], [2.0, -0.5], "sum")
    model.eval().set_adapter("same")
    with torch.no_grad():
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-4)
    model.set_adapter("sum")
    with torch.no_grad():
        result = output(model, inputs)
    assert (result - expected).abs().max() > 1e-4
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(BACKBONES["bert"].build(), tmp_path / "sum").eval()
    with torch.no_grad():
        assert torch.equal(output(again, inputs), result)


def test_weights_of_a_sum():
    """theta = sum_i w_i theta_i, with the head."""
    names = ("first", "second")
    config = UniPELTConfig(bottleneck_size=4, task_type="SEQ_CLS")
    model = get_peft_model(classifier()[0], config, adapter_name="first")
    model.add_adapter("second", UniPELTConfig(bottleneck_size=4, task_type="SEQ_CLS"))
    for seed, name in enumerate(names):
        randomise(model, name, seed)
    model.add_weighted_adapter(names, [0.7, 0.3], "sum")
    state = model.state_dict()
    combined = [key for key in state if ".sum." in key]
    assert any("modules_to_save" in key for key in combined)
    for key in combined:
        first, second = (state[key.replace(".sum.", f".{name}.")] for name in names)
        torch.testing.assert_close(state[key], 0.7 * first + 0.3 * second)


@FAMILIES
def test_average_of_outputs(backbone):
    """An untrained light fusion is the weighted mean of what the adapters add at each place."""
    model = adapted(backbone, lambda: UniPELTConfig(methods=("lora",), gated=False, r=2))
    model.add_adapter("mean", AttentionFusionConfig(adapters=["first", "second"], weights=[3.0, 1.0]))
    inputs = BACKBONES[backbone].inputs()
    mean = only(model, "mean", inputs)
    for module in model.modules():
        for name, weight in {"first": 0.75, "second": 0.25}.items():
            if name in getattr(module, "sublayer_of", {}):
                module.sublayer_of[name].B.data *= weight
    torch.testing.assert_close(only(model, ["first", "second"], inputs), mean, rtol=1e-4, atol=1e-4)


ERRORS = [
    ([], [], "sum", r"`adapters` \(=\[\]\) must be a list of names"),
    ("first", [1.0], "sum", r"`adapters` \(='first'\) must be a list of names"),
    (["x"], [1.0], "sum", r"`adapters` \(=\['x'\]\) must be adapters of this model: \['first', 'second'\]"),
    (["first", "second"], [1.0], "sum", r"`weights` \(=\[1.0\]\) must have one number for each adapter"),
    (["first"], ["1"], "sum", r"`weights` \(=\['1'\]\) must be numbers"),
    (["first"], [1.0], "second", r"`adapter_name` \(='second'\) is taken by an adapter"),
]


@pytest.mark.parametrize(("adapters", "weights", "name", "message"), ERRORS)
def test_weighted_errors(adapters, weights, name, message):
    model = adapted("bert", lambda: BottleneckConfig(r=4))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name)
    assert [*model.peft_config] == ["first", "second"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda: BottleneckConfig(r=5), "must have equal configs, but differ in r"),
        (LayerPrefixConfig, "must be of one type, not of BottleneckConfig and LayerPrefixConfig"),
    ],
)
def test_different_adapters_have_no_sum(second, message):
    model = adapted("bert", lambda: BottleneckConfig(r=4), second)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")


def test_differences_at_other_entries_have_no_sum():
    model = adapted("bert", lambda: SparseConfig(selection="random", density=0.3))
    for module in model.modules():
        if "second" in getattr(module, "deltas_of", {}):
            module.deltas_of["second"].indices.add_(1)
    with pytest.raises(ValueError, match=r"`adapters` \(='indices'\) must be equal in all adapters"):
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config


# One batch through several adapters


@FAMILIES
@pytest.mark.parametrize("config", [lambda: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4), TFewConfig])
def test_parallel_and_split(backbone, config):
    """`Parallel` is a repeated batch, `BatchSplit` a name for each row: each row is as with its adapter alone."""
    model, inputs = adapted(backbone, config), BACKBONES[backbone].inputs()
    alone = {name: only(model, name, inputs) for name in ("first", "second")}
    rows = len(inputs["input_ids"])
    twice = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in inputs.items()}
    names = [name for name in alone for _ in range(rows)]
    for name, part in zip(alone, only(model, None, twice, adapter_names=names).chunk(2), strict=True):
        assert_same_rows(part, alone[name], inputs)
    split = only(model, None, inputs, adapter_names=["first", "second", "second"])
    assert_same_rows(split[:1], alone["first"][:1], inputs, slice(0, 1))
    assert_same_rows(split[1:], alone["second"][1:], inputs, slice(1, None))


def assert_same_rows(result, expected, inputs, rows=slice(None)):
    mask = inputs.get("decoder_attention_mask", None if "decoder_input_ids" in inputs else inputs["attention_mask"])
    if mask is None:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    else:
        visible = mask[rows].bool()
        torch.testing.assert_close(result[visible], expected[visible], rtol=1e-4, atol=1e-4)


def test_a_ladder_stands_alone():
    model = adapted("bert", lambda: LadderConfig(r=4, layers_to_keep=[1]))
    with pytest.raises(ValueError, match="must be a single one"):
        model.base_model.set_adapter(["first", "second"])
