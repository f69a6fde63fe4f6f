"""What every method keeps on every backbone: each test runs for all methods x all families of models, some slowly."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from .backbones import BACKBONES, output
from .methods import ALL as METHODS
from .methods import is_fast, randomise
from .saved_adapters import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*leaves parts of the FFN as they are:UserWarning")
PAIRS = [(b, m) for m, method in METHODS.items() for b in BACKBONES if b not in method.refused]


def cases(pairs):
    """The pairs as parameters of a test; those that the fast tests leave out are slow."""
    return [pytest.param(*pair, marks=[] if is_fast(*pair) else [pytest.mark.slow]) for pair in pairs]


every_pair = pytest.mark.parametrize(("backbone", "method"), cases(PAIRS))
decoders = pytest.mark.parametrize(
    ("backbone", "method"), cases([(b, m) for b, m in PAIRS if BACKBONES[b].kind != "encoder"])
)
refusals = pytest.mark.parametrize(
    ("backbone", "method"), [(b, m) for m, method in METHODS.items() for b in method.refused]
)


def loss(result):
    """A random sum: the mean square would hardly move behind a last layer norm."""
    return (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(2))).mean()


def tuned(method, backbone, **kwargs):
    """A model with a random adapter, and inputs for it."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(**kwargs), METHODS[method]())
    randomise(model)
    return model.eval(), family.inputs()


@every_pair
def test_start_effect_and_disable(method, backbone):
    """Starts as the base model, unless a paper begins elsewhere; with weights it acts; disabled it does not."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), METHODS[method]()).eval()
    inputs = family.inputs()
    with torch.no_grad():
        base = output(family.build(), inputs)
        start = output(model, inputs)
        if METHODS[method].starts_as_base:
            torch.testing.assert_close(start, base, rtol=0, atol=1e-5)
        else:
            assert (start - base).abs().max() > 1e-3
        randomise(model)
        assert (output(model, inputs) - base).abs().max() > 1e-2
        with model.disable_adapter():
            assert torch.equal(output(model, inputs), base)


@every_pair
def test_trains_only_itself(method, backbone):
    """Every adapter weight gets a gradient (but for a pooler that the outputs leave out), no base weight does."""
    model, inputs = tuned(method, backbone)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    loss(output(model, inputs)).backward()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if METHODS[method].owns(n)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "pooler" in name or parameter.grad is not None, name
        else:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])


@every_pair
def test_saves_exactly_itself(method, backbone, tmp_path):
    """The file holds adapter tensors only; reloaded, with or without low memory, the outputs are equal to the bit."""
    model, inputs = tuned(method, backbone)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys
    assert all(METHODS[method].part in key.split(".") for key in keys)
    with torch.no_grad():
        expected = output(model, inputs)
        for low_cpu_mem_usage in (False, True):
            base = BACKBONES[backbone].build()
            again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
            assert torch.equal(output(again, inputs), expected)


@every_pair
def test_unloads_to_the_base(method, backbone):
    """unload leaves no parameter, hook, config or changed output behind."""
    model, inputs = tuned(method, backbone)
    fresh = BACKBONES[backbone].build()
    with torch.no_grad():
        output(model, inputs)
        base = model.unload()
        assert torch.equal(output(base, inputs), output(fresh, inputs))
    assert base.state_dict().keys() == fresh.state_dict().keys()
    for (name, module), other in zip(base.named_modules(), fresh.modules(), strict=True):
        assert type(module) is type(other)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            assert len(getattr(module, hooks)) == len(getattr(other, hooks)), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@every_pair
def test_gradient_checkpointing(method, backbone, reentrant):
    """The same gradients with and without checkpointing, of both kinds."""
    if backbone == "albert":
        pytest.skip("ALBERT in transformers has no checkpointing")
    model, inputs = tuned(method, backbone)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for parent in model.modules():  # dropout kept as numbers
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(parent, name, None), float):
                setattr(parent, name, 0.0)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)  # the same experts of AdaMix
        kwargs = {} if BACKBONES[backbone].kind == "encoder" else {"use_cache": False}
        loss(output(model, inputs, **kwargs)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(
            checkpointed[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_mixed(model, inputs, alone):
    """One batch whose rows have the second adapter, the first and none."""
    mixed = output(model, inputs, adapter_names=["other", "default", "__base__"])
    for row, expected in enumerate(alone):
        visible = inputs["attention_mask"][row].bool()
        if "decoder_input_ids" in inputs:
            visible = torch.ones_like(inputs["decoder_input_ids"][row]).bool()
        torch.testing.assert_close(mixed[row][visible], expected[row][visible], rtol=1e-4, atol=1e-4)


@every_pair
def test_two_adapters(method, backbone):
    """A second adapter leaves the first as it is; each can be set and deleted; one batch can mix them."""
    model, inputs = tuned(method, backbone)
    with torch.no_grad():
        first = output(model, inputs)
        model.add_adapter("other", METHODS[method].second(backbone))
        randomise(model, "other", seed=7)
        model.eval()
        assert torch.equal(output(model, inputs), first)
        model.set_adapter("other")
        second = output(model, inputs)
        assert (second - first).abs().max() > 1e-3
        with model.disable_adapter():
            base = output(model, inputs)
        if METHODS[method].mixes:
            check_mixed(model, inputs, (second, first, base))
        else:
            with pytest.raises(ValueError, match=r"`adapter_names` \(=\['other', 'default', '__ba.* must be None"):
                output(model, inputs, adapter_names=["other", "default", "__base__"])
        assert torch.equal(output(model, inputs), second)
        model.delete_adapter("default")
        assert torch.equal(output(model, inputs), second)
        assert not any(".default" in name for name, _ in model.named_parameters())


@every_pair
def test_deepcopy(method, backbone):
    """A copy gives the same outputs and shares nothing with the original, also when it is unloaded."""
    model, inputs = tuned(method, backbone)
    with torch.no_grad():
        expected = output(model, inputs)
        twin = copy.deepcopy(model)
        randomise(model, seed=3)
        assert torch.equal(output(twin, inputs), expected)
        changed = output(model, inputs)
        twin.unload()
        assert torch.equal(output(model, inputs), changed)


@decoders
def test_no_token_sees_a_later_one(method, backbone):
    """Changing token t + 1 never changes the logits at t."""
    model, inputs = tuned(method, backbone)
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    changed = {**inputs, key: inputs[key].clone()}
    changed[key][:, -1] = (changed[key][:, -1] + 7) % 50 + 3
    with torch.no_grad():
        before, after = output(model, inputs), output(model, changed)
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=0, atol=1e-5)
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@decoders
def test_cached_generation_equals_uncached(method, backbone, attention):
    """Greedy and beam search give the same tokens with and without the cache, with padding on the left."""
    family = BACKBONES[backbone]
    model, _ = tuned(method, backbone, attention=attention)
    inputs = family.inputs(padding="left")
    inputs.pop("decoder_input_ids", None)
    for beams in (1, 2):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
        with torch.no_grad():
            cached = model.generate(**inputs, **options, use_cache=True)
            assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@refusals
def test_refused_families(backbone, method):
    """A family that a method cannot be put on: an error that says why, and the model as it was."""
    base = BACKBONES[backbone].build()
    before = fingerprint(base)
    with pytest.raises(ValueError, match=METHODS[method].refused[backbone]):
        get_peft_model(base, METHODS[method]())
    assert fingerprint(base) == before


@every_pair
def test_merging(backbone, method):
    """Merged, it gives the same outputs; what cannot be merged says so, and goes on."""
    model, inputs = tuned(method, backbone)
    with torch.no_grad():
        expected = output(model, inputs)
        if METHODS[method].mergeable:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The merged model has biases")  # where the class builds none
                merged = model.merge_and_unload(safe_merge=True)
            torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-3, atol=1e-3)
        else:
            with pytest.raises(ValueError, match=r"cannot be merged into weights|no weight of the base model equals"):
                model.merge_and_unload()
            assert torch.equal(output(model, inputs), expected)
