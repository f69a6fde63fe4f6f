"""Attention fusion: several adapters of one model, also of several methods, weighed at each place."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_peft_ext import (
    AdaMixConfig,
    AttentionFusionConfig,
    BottleneckConfig,
    CompacterConfig,
    ComposedConfig,
    LayerPrefixConfig,
    Placement,
    UniPELTConfig,
    load_adapter,
    sublayer_parameter_groups,
)
from hf_peft_ext.sublayers import AdapterFusion, AttentionFusion, Bottleneck

from .backbones import BACKBONES, output
from .methods import randomise

CONFIGS = {
    "first": lambda: BottleneckConfig(style="houlsby", r=4),
    "second": lambda: CompacterConfig(r=8),
    "third": lambda: AdaMixConfig(r=4),
    "lora": lambda: UniPELTConfig(methods=("lora",), gated=False, r=2),
    "lora2": lambda: UniPELTConfig(methods=("lora",), r=2),
}


def adapted(backbone, *names):
    """A model with these adapters, of random weights."""
    first, *others = names
    model = get_peft_model(BACKBONES[backbone].build(), CONFIGS[first](), adapter_name=first)
    for name in others:
        model.add_adapter(name, CONFIGS[name]())
    for seed, name in enumerate(names):
        randomise(model, name, seed)
    return model.eval()


def fused(backbone, *names, **fields):
    model = adapted(backbone, *names)
    model.add_adapter("both", AttentionFusionConfig(adapters=[*names], **fields))
    model.set_adapter("both")
    return model.eval()


def test_formula():
    """sum_k a_k f_k(x) with a = softmax_k(q f_k(x)), for each token; the mean of the f_k at the start."""
    torch.manual_seed(0)
    sublayers = torch.nn.ModuleDict({name: Bottleneck(6, 3, init=1.0) for name in "abc"})
    module, x = AttentionFusion(6, ["a", "c"], sublayers), torch.randn(2, 5, 6)
    f = [sublayers["a"](x), sublayers["c"](x)]
    torch.testing.assert_close(module(x), (f[0] + f[1]) / 2)
    with torch.no_grad():
        module.q.normal_()
    weights = torch.stack([(one * module.q).sum(-1).exp() for one in f])
    naive = sum(w[..., None] * one for w, one in zip(weights / weights.sum(0), f, strict=True))
    torch.testing.assert_close(module(x), naive)
    torch.testing.assert_close(module.add(x, x), x + naive)
    assert [name for name, _ in module.named_parameters()] == ["q"]


def test_weights():
    """The untrained fusion is the mean with these weights; trained, they are a prior of the attention."""
    sublayers = torch.nn.ModuleDict({name: Bottleneck(6, 3, init=1.0) for name in "ab"})
    module, x = AttentionFusion(6, ["a", "b"], sublayers, [0.8, 0.2]), torch.randn(2, 5, 6)
    f = [sublayers["a"](x), sublayers["b"](x)]
    torch.testing.assert_close(module(x), 0.8 * f[0] + 0.2 * f[1])
    with torch.no_grad():
        module.q.normal_()
    weights = [w * (one @ module.q).exp() for w, one in zip([0.8, 0.2], f, strict=True)]
    naive = sum(w[..., None] * one for w, one in zip(weights, f, strict=True)) / sum(weights)[..., None]
    torch.testing.assert_close(module(x), naive)
    assert [*module.state_dict()] == ["q"]


@pytest.mark.parametrize("value", [True, False])
def test_formula_of_pfeiffer(value):
    """sum_k a_k V f_k(x) with a = softmax_k((Q x)(K f_k(x))), for each token; nearly the mean at the start."""
    torch.manual_seed(0)
    sublayers = torch.nn.ModuleDict({name: Bottleneck(6, 3, init=1.0) for name in "abc"})
    module, x = AdapterFusion(6, 6, ["a", "c"], sublayers, value), torch.randn(2, 5, 6)
    f = [sublayers["a"](x), sublayers["c"](x)]
    torch.testing.assert_close(module(x), (f[0] + f[1]) / 2, rtol=0.1, atol=0.1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    v = module.W_V if value else torch.eye(6)
    expected = torch.empty(2, 5, 6)
    for b in range(2):
        for t in range(5):
            q = module.W_Q @ x[b, t] + module.b_Q
            scores = torch.stack([q @ (module.W_K @ one[b, t] + module.b_K) for one in f])
            expected[b, t] = sum(a * (v @ one[b, t]) for a, one in zip(scores.softmax(0), f, strict=True))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("style", ["light", "pfeiffer"])
@pytest.mark.parametrize("backbone", ["bert", "t5", "llama"])
@pytest.mark.parametrize("names", [("first", "second", "third"), ("lora", "lora2")], ids=["bottlenecks", "lora"])
def test_fuses(backbone, names, style, tmp_path):
    """It trains its own parameters alone, saves them alone, and loads beside the same adapters bit for bit."""
    model, inputs = fused(backbone, *names, style=style), BACKBONES[backbone].inputs()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = ("q",) if style == "light" else ("W_Q", "b_Q", "W_K", "b_K", "W_V")
    assert {name.partition(".sublayer_of.both.")[2] for name in trained} == {*own}
    output(model, inputs).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    randomise(model, "both", 7)
    for name in (*names, "both"):
        model.save_pretrained(tmp_path, selected_adapters=[name])
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "both" / "adapter_model.safetensors")} == {*own}
    with torch.no_grad():
        expected = output(model, inputs)
        assert torch.equal(output(copy.deepcopy(model), inputs), expected)
        base = output(BACKBONES[backbone].build().eval(), inputs)
        with model.disable_adapter():
            assert torch.equal(output(model, inputs), base)
        for load in (load_adapter, PeftModel.from_pretrained):
            again = load(BACKBONES[backbone].build(), tmp_path / names[0], names[0])
            for name in (*names[1:], "both"):
                load_adapter(again, tmp_path / name, name) if load is load_adapter else again.load_adapter(
                    tmp_path / name, name
                )
            again.set_adapter("both")
            assert torch.equal(output(again.eval(), inputs), expected)
        base = model.unload()
        assert torch.equal(output(base, inputs), output(BACKBONES[backbone].build().eval(), inputs))


def test_equals_the_adapter_that_it_attends_to():
    """A large query gives all of the weight to one adapter where its outputs score highest."""
    placements = [Placement("bottleneck", "after_ffn", options={"r": 2})]
    model = get_peft_model(BACKBONES["bert"].build(), ComposedConfig(placements=placements), adapter_name="first")
    model.add_adapter("second", ComposedConfig(placements=placements))
    randomise(model, "first")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sublayer_of.second.up.bias"):
                parameter.fill_(0.5)
    model.add_adapter("both", AttentionFusionConfig(adapters=["first", "second"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".both." in name:
                parameter.fill_(-100.0)
        inputs, outputs = BACKBONES["bert"].inputs(), {}
        for name in ("first", "second", "both"):
            model.set_adapter(name)
            outputs[name] = output(model.eval(), inputs)
    assert (outputs["both"] - outputs["second"]).abs().max() > 1e-3
    assert (outputs["both"] - outputs["first"]).abs().max() < (outputs["second"] - outputs["first"]).abs().max()


def test_some_layers_and_its_learning_rate():
    model = fused("bert", "first", "second", layers_to_transform=[1])
    places = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(places) == 2
    assert all("layer.1." in name for name in places)
    assert [g["lr"] for g in sublayer_parameter_groups(model, 1e-3, gate=1e-1)] == [1e-1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, inputs = fused("llama", "first", "second"), BACKBONES["llama"].inputs()

    def gradients():
        model.zero_grad()
        output(model.train(), inputs, use_cache=False).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-6)


def test_mixed_batch():
    """Rows of one batch may have the fusion, one of its adapters, or none."""
    model, inputs = fused("bert", "first", "second"), BACKBONES["bert"].inputs()
    randomise(model, "both", 5)
    with torch.no_grad():
        alone = []
        for name in ("both", "first"):
            model.set_adapter(name)
            alone.append(output(model, inputs))
        with model.disable_adapter():
            alone.append(output(model, inputs))
        mixed = output(model, inputs, adapter_names=["both", "first", "__base__"])
    for row, expected in enumerate(alone):
        visible = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row][visible], expected[row][visible], rtol=1e-4, atol=1e-4)


def with_prefix():
    model = get_peft_model(BACKBONES["bert"].build(), LayerPrefixConfig(), adapter_name="prefixed")
    model.add_adapter("second", CompacterConfig(r=8))
    model.add_adapter("both", AttentionFusionConfig(adapters=["prefixed", "second"]))


ERRORS = [
    (
        lambda: adapted("bert", "first").add_adapter("x", AttentionFusionConfig()),
        r"`adapters` \(=\[\]\) must hold two names or more",
    ),
    (lambda: AttentionFusionConfig(adapters=["a", "a"]), r"`adapters` .* must be a list of different names"),
    (lambda: AttentionFusionConfig(style="heavy"), r"`style` \(='heavy'\) must be light or pfeiffer"),
    (lambda: AttentionFusionConfig(value=1), r"`value` \(=1\) must be True or False"),
    (lambda: AttentionFusionConfig(value=False), r"`value` \(=False\) must be True where `style` is light"),
    (
        lambda: AttentionFusionConfig(adapters=["a", "b"], weights=[1.0]),
        r"`weights` \(=\[1.0\]\) must have one for each adapter",
    ),
    (lambda: AttentionFusionConfig(adapters=["a", "b"], weights=[1.0, 0.0]), r"`weights` \(=0.0\) must be"),
    (
        lambda: AttentionFusionConfig(adapters=["a"], weights=[1.0], style="pfeiffer"),
        r"`weights` \(=\[1.0\]\) must be None where `style` is pfeiffer",
    ),
    (lambda: AttentionFusionConfig(adapters="ab"), r"`adapters` \(='ab'\) must be a list of different names"),
    (lambda: AttentionFusionConfig(adapters=["a", "b"], sites={"query": ["q"]}), r"`sites` .* must be None"),
    (
        lambda: fused("bert", "first", "second", layers_to_transform=[7]),
        r"`layers_to_transform` \(=\[7\]\) holds no layer with",
    ),
    (
        lambda: adapted("bert", "first").add_adapter("x", AttentionFusionConfig(adapters=["first", "nope"])),
        r"`adapters` \(=\['nope'\]\) must be adapters that the model has already; load them first",
    ),
    (
        lambda: get_peft_model(BACKBONES["bert"].build(), AttentionFusionConfig(adapters=["a", "b"])),
        r"`adapters` \(=\['a', 'b'\]\) must be adapters that the model has already",
    ),
    (with_prefix, r"`adapters` \(=\['prefixed', 'second'\]\) cannot be combined: 'prefixed' has a Prefix at"),
    (
        lambda: fused("bert", "first", "second").merge_and_unload(),
        r"cannot be merged into weights",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message[:36] for _, message in ERRORS])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
