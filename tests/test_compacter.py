"""Compacter: the Kronecker sum against torch.kron, and the rule that all layers of an adapter share."""

import copy
import pickle
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_peft_ext import CompacterConfig, ComposedConfig, Placement, load_adapter, sublayer_parameter_groups
from hf_peft_ext.sublayers import PHMBottleneck, PHMRule
from hf_peft_ext.transfer import plug

from .backbones import BACKBONES, output
from .methods import randomise


def rules(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(".factors")}


def tuned(backbone="bert", **fields):
    model = get_peft_model(BACKBONES[backbone].build(), CompacterConfig(r=8, **fields))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("n", "rank"), [(4, 1), (2, 3)])
def test_formula(n, rank, shared):
    """W = sum_i A_i (x) (s_i t_i), with values and gradients of the naive sum; f = up(gelu(down(x)))."""
    torch.manual_seed(0)
    rule = PHMRule(n, 1.0) if shared else None
    module = PHMBottleneck(12, 8, n, rank, rule, init=1.0, activation="gelu_new")
    for linear in (module.down, module.up):
        own = rule or linear.rule
        naive = sum(torch.kron(own.factors[i], linear.s[i] @ linear.t[i]) for i in range(n))
        torch.testing.assert_close(linear.weight, naive)
        weight = torch.randn_like(naive)
        inputs = (own.factors, linear.s, linear.t)
        ours, theirs = (torch.autograd.grad((w * weight).sum(), inputs) for w in (linear.weight, naive))
        torch.testing.assert_close(ours, theirs)
    x = torch.randn(3, 5, 12)
    z = torch.nn.functional.gelu(x @ module.down.weight.T + module.down.bias, approximate="tanh")
    torch.testing.assert_close(module(x), z @ module.up.weight.T + module.up.bias)
    torch.testing.assert_close(module.add(x, x), x + module(x), rtol=1e-4, atol=1e-5)


def test_parameters():
    """Each matrix has n (d_in / n + d_out / n) rank numbers and a bias, and the adapter n^3 more."""
    d, r, n, layers = 32, 8, 4, 2
    place = 2 * (d + r) + r + d
    for style, places in (("compacter", 2), ("compacter++", 1)):
        model = tuned(style=style)
        assert model.num_parameters(only_trainable=True) == layers * places * place + n**3
        assert len(rules(model)) == 1
    assert len(rules(tuned(shared_phm_rule=False))) == layers * 2 * 2
    config = CompacterConfig(reduction_factor=5)  # 32 / 5 = 6.4, rounded to a multiple of 4
    assert get_peft_model(BACKBONES["bert"].build(), config).num_parameters(only_trainable=True) == (
        layers * 2 * place + n**3
    )


@pytest.mark.parametrize("shared", [True, False])
def test_begins_as_the_base_or_as_in_the_paper(shared):
    """`init="paper"` begins near the base model: the A_i have a standard deviation of 1e-4, or 1e-2 in each matrix."""
    inputs, fields = BACKBONES["bert"].inputs(), {"reduction_factor": 4, "shared_phm_rule": shared}
    with torch.no_grad():
        base = output(BACKBONES["bert"].build().eval(), inputs)
        for init in ("base", "paper"):
            model = get_peft_model(BACKBONES["bert"].build(), CompacterConfig(init=init, **fields)).eval()
            assert torch.equal(output(model, inputs), base) == (init == "base") or shared
            up = [p for n, p in model.named_parameters() if n.endswith("up.t")]
            assert all(p.any() == (init == "paper") for p in up)
            std = torch.cat([p.flatten() for p in rules(model).values()]).std().item()
            assert std == pytest.approx({"base": 0.25, "paper": 1e-4 if shared else 1e-2}[init], rel=0.3)


@pytest.mark.parametrize("backbone", ["bert", "t5", "llama"])
def test_rule_is_saved_once(backbone, tmp_path):
    """The file has one rule; every way to load it gives the same outputs bit for bit, with one rule in the model."""
    family = BACKBONES[backbone]
    model, inputs = tuned(backbone), family.inputs()
    model.save_pretrained(tmp_path)
    assert sum(key.endswith("factors") for key in load_file(tmp_path / "adapter_model.safetensors")) == 1
    with torch.no_grad():
        expected = output(model, inputs)
        loaded = [
            PeftModel.from_pretrained(family.build(), tmp_path).eval(),
            PeftModel.from_pretrained(family.build(), tmp_path, low_cpu_mem_usage=True).eval(),
            load_adapter(family.build(), tmp_path).eval(),
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
        ]
        for other in loaded:
            assert torch.equal(output(other, inputs), expected)
            (rule,) = rules(other).values()
            rule.mul_(2)  # every layer reads it
            assert not torch.equal(output(other, inputs), expected)
        assert torch.equal(output(model, inputs), expected)
    plain = family.build().eval()
    plain.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(output(plain, inputs), expected)


def test_several_adapters(tmp_path):
    """Each adapter has its own rule. The second one may come from a file; deleting the first leaves the second."""
    inputs = BACKBONES["bert"].inputs()
    first, second = tuned(), tuned(phm_dim=2)
    second.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = output(second, inputs)
        load_adapter(first, tmp_path, "other")
        assert {tuple(p.shape) for p in rules(first).values()} == {(4, 4, 4), (2, 2, 2)}
        first.set_adapter("other")
        assert [p.requires_grad for n, p in rules(first).items()] == [False, True]
        first.eval()
        assert torch.equal(output(first, inputs), expected)
        first.delete_adapter("default")
        assert torch.equal(output(first, inputs), expected)
        assert [tuple(p.shape) for p in rules(first).values()] == [(2, 2, 2)]


def test_rule_gets_the_gradients_of_all_layers():
    """The gradient of the shared rule is the sum of those of equal rules, one in each matrix."""
    inputs = BACKBONES["llama"].inputs()
    shared, own = tuned("llama"), tuned("llama", shared_phm_rule=False)
    (rule,) = rules(shared).values()
    state = dict(shared.named_parameters())
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(rule if name.endswith("factors") else state[name])
    for model in (shared, own):
        output(model, inputs).square().mean().backward()
    torch.testing.assert_close(rule.grad, sum(p.grad for p in rules(own).values()), rtol=1e-4, atol=1e-7)


def test_learning_rate_of_bottlenecks_holds_for_the_rule():
    model = tuned()
    groups = sublayer_parameter_groups(model, 1e-3, bottleneck=1e-2)
    (rule,) = rules(model).values()
    assert [group["lr"] for group in groups if any(p is rule for p in group["params"])] == [1e-2]


def test_trains_layer_norms_too():
    """As in the authors' code, with peft's `modules_to_save`."""
    model = get_peft_model(BACKBONES["bert"].build(), CompacterConfig(r=8, modules_to_save=["LayerNorm"]))
    output(model, BACKBONES["bert"].inputs()).sum().backward()
    assert any("LayerNorm.modules_to_save" in name and p.grad is not None for name, p in model.named_parameters())


def test_composed():
    """A PHM bottleneck is an option of a placement, beside other sub-layers and with a gate."""
    placements = [
        Placement("bottleneck", "parallel_ffn", gate="auto", options={"r": 4, "phm_dim": 2}),
        Placement("bottleneck", "after_attention", options={"r": 4}),
    ]
    model = get_peft_model(BACKBONES["llama"].build(), ComposedConfig(placements=placements))
    assert len(rules(model)) == 1
    output(model, BACKBONES["llama"].inputs()).square().mean().backward()


ERRORS = [
    (lambda: CompacterConfig(style="compact"), "`style` (='compact') must be one of compacter, compacter++."),
    (lambda: CompacterConfig(phm_dim=0), "`phm_dim` (=0) must be a positive whole number."),
    (lambda: CompacterConfig(phm_rank=0), "`phm_rank` (=0) must be a positive whole number."),
    (lambda: CompacterConfig(r=6), "`r` (=6) must be a multiple of `phm_dim` (=4)."),
    (lambda: CompacterConfig(shared_phm_rule=1), "`shared_phm_rule` (=1) must be True or False."),
    (
        lambda: Placement("bottleneck", "after_ffn", options={"r": 4, "phm_rank": 2}),
        "`phm_rank` (=2) needs `phm_dim`.",
    ),
    (
        lambda: ComposedConfig(
            placements=[
                Placement("bottleneck", "after_ffn", options={"r": 4, "phm_dim": 4}),
                Placement("bottleneck", "after_attention", options={"r": 4, "phm_dim": 2}),
            ]
        ),
        "`phm_dim` (=[2, 4]) must be one number where `shared_phm_rule` is True.",
    ),
    (
        lambda: get_peft_model(BACKBONES["bert"].build(), CompacterConfig(phm_dim=5)),
        "`phm_dim` (=5) must divide 32, the width at encoder.layer.0.attention.output.dense.",
    ),
    (
        lambda: plug(tuned("llama"), BACKBONES["llama"].build()),
        "`adapter_name` (='default') holds a PHMBottleneck at model.layers.0.self_attn.o_proj,",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
