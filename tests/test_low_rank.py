"""The low-rank branch against peft's LoRA, and merging."""

import peft.tuners.lora
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_peft_ext import BitFitConfig, UniPELTConfig, fix_gates
from hf_peft_ext.sublayers import LowRank

from .backbones import BACKBONES, output
from .methods import METHODS, randomise

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"], "gpt2": ["c_attn"]}


def lora_pair(backbone, **kwargs):
    """Our ungated branch and peft's LoRA on the same leaves, with the same weights."""
    family, targets = BACKBONES[backbone], TARGETS[backbone]
    options = {"r": 3, "lora_alpha": 12, "target_modules": targets}
    fan = {"fan_in_fan_out": True} if backbone == "gpt2" else {}
    theirs = get_peft_model(family.build(), LoraConfig(**options, **fan, **kwargs)).eval()
    ours = get_peft_model(family.build(), UniPELTConfig(methods=("lora",), gated=False, **options)).eval()
    randomise(theirs)
    state = {name.replace(".lora_", "|").split("|")[0]: {} for name, _ in theirs.named_parameters() if "lora_" in name}
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            leaf, part = name.split(".lora_")
            state[leaf][part[0]] = parameter
    for name, module in ours.named_modules():
        if isinstance(module, LowRank):
            leaf = name.removesuffix(".target_low_rank.sublayer_of.default")
            with torch.no_grad():
                module.A.copy_(state[leaf]["A"])
                module.B.copy_(state[leaf]["B"])
    return ours, theirs, state


@pytest.mark.parametrize("backbone", TARGETS)
def test_equals_peft_lora(backbone):
    """The same leaves and weights: the same outputs and the same gradients."""
    ours, theirs, state = lora_pair(backbone)
    inputs = BACKBONES[backbone].inputs()
    expected = output(theirs, inputs)
    got = output(ours, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    (expected * weight).mean().backward()
    (got * weight).mean().backward()
    branches = [(n, m) for n, m in ours.named_modules() if isinstance(m, LowRank)]
    assert len(branches) == len(state)
    for name, module in branches:
        parts = state[name.removesuffix(".target_low_rank.sublayer_of.default")]
        torch.testing.assert_close(module.A.grad, parts["A"].grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(module.B.grad, parts["B"].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_initialises_as_peft_does(init):
    """From the same seed, A has the very numbers that peft gives it; B is zero."""
    theirs = peft.tuners.lora.Linear(torch.nn.Linear(40, 24), "default", r=4, config=LoraConfig())
    torch.manual_seed(3)
    theirs.reset_lora_parameters("default", init)
    torch.manual_seed(3)
    ours = LowRank(40, 24, r=4, init_lora_weights=init)
    assert torch.equal(ours.A, theirs.lora_A["default"].weight)
    assert not ours.B.any()


def test_lora_targets():
    """Query and value as in UniPELT's code, query and key as in its text, fused projections by their rows."""
    for targets in (("query", "value"), ("query", "key")):
        model = get_peft_model(BACKBONES["bert"].build(), UniPELTConfig(methods=("lora",), lora_targets=targets))
        leaves = {n.split(".")[-3] for n, m in model.named_modules() if isinstance(m, LowRank)}
        assert leaves == {f"{target}_low_rank" for target in targets}


@pytest.mark.parametrize("backbone", ["gpt2", "gpt_neox", "modernbert"])
def test_fused_projections_change_only_their_rows(backbone):
    """A branch on the value leaves queries and keys of a fused projection as they are."""
    family = BACKBONES[backbone]
    base, model = family.build(), None
    model = get_peft_model(family.build(), UniPELTConfig(methods=("lora",), gated=False, lora_targets=("value",)))
    randomise(model)
    layer = next(m for m in model.modules() if isinstance(m, LowRank))
    path = next(n for n, m in model.named_modules() if m is layer).split(".value_low_rank")[0]
    leaf, plain = model.get_submodule(path), base.get_submodule(path.removeprefix("base_model.model."))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        change = leaf(x) - plain(x)
    heads, d = 4, 8
    if backbone == "gpt_neox":  # head by head: query, key, value
        q, k, v = change.view(2, 5, heads, 3, d).unbind(3)
    else:
        q, k, v = change.chunk(3, dim=-1)
    assert q.abs().max() < 1e-6
    assert k.abs().max() < 1e-6
    assert v.abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:The merged model has biases:UserWarning")
@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.mergeable])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_merge(method, backbone):
    """Merged, unmerged and merged for good: the outputs stay, and the model is a plain one again."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), METHODS[method]())
    randomise(model)
    model.eval()
    inputs = family.inputs()
    with torch.no_grad():
        expected = output(model, inputs)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload()
        torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    assert type(merged) is type(family.build())
    assert not any("sublayer_of" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.mergeable])
def test_what_cannot_be_merged_is_named(method):
    """The refusal names sub-layers and leaves the model as it was."""
    family = BACKBONES["bert"]
    model = get_peft_model(family.build(), METHODS[method]())
    randomise(model)
    model.eval()
    with torch.no_grad():
        before = output(model, family.inputs())
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"sub-layers cannot be merged into weights: encoder\.layer\.0"):
                merge()
        assert torch.equal(output(model, family.inputs()), before)


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "t5", "llama"])
def test_gates_fixed_to_their_mean_can_be_merged(backbone):
    """fix_gates makes a gated low-rank branch a constant multiple of B A, which merges."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), UniPELTConfig(methods=("lora",), r=2))
    randomise(model)
    model.eval()
    inputs = family.inputs()
    with pytest.raises(ValueError, match="fix_gates"):
        model.merge_and_unload()
    means = fix_gates(model, inputs)
    assert all(0 < mean < 1 for mean in means.values())
    with torch.no_grad():
        fixed = output(model, inputs)
        torch.testing.assert_close(output(model.merge_and_unload(), inputs), fixed, rtol=1e-4, atol=1e-4)


def test_safe_merge_refuses_what_is_not_finite():
    model = get_peft_model(BACKBONES["bert"].build(), BitFitConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sublayer_of" in name:
                parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"`safe_merge` \(=True\)"):
        model.merge_and_unload(safe_merge=True)
