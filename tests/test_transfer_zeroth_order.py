"""MeZO's slope against the true directional derivative in float64, its steps against the formula written out, and what
it leaves behind; scales of a module against multiplied tensors; results against scikit-learn and counted rows.
"""

import pytest
import torch
from peft import get_peft_model

from hf_peft_ext.transfer import MeZO, PlugInResult, layer_scales, merge_projections
from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensors
from hf_peft_ext.transfer.refine.mezo import trained
from hf_peft_ext.transfer.refine.module_scale import at_scale
from hf_peft_ext.transfer.run.result import Measured, gain_interval

from .backbones import BACKBONES, output
from .methods import randomise
from .test_transfer_fold import KINDS, plugged_model, refuses, slow


def small(kind="lora", family="llama"):
    model = get_peft_model(BACKBONES[family].build(), KINDS[kind](family)).eval()
    randomise(model)
    return model


def noise(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


@pytest.mark.parametrize("kind", ["lora", slow("bottleneck"), slow("prefix")])
def test_slope_is_the_directional_derivative(kind):
    model, inputs = small(kind, "gpt2").double(), BACKBONES["gpt2"].inputs()  # Llama's norms are of float32
    parameters = trained(model)

    def loss():
        return output(model, inputs).square().mean()

    gradients = torch.autograd.grad(loss(), parameters)
    for seed in range(3):
        true = sum((g * z).sum() for g, z in zip(gradients, noise(parameters, seed), strict=True))
        assert MeZO(parameters, eps=1e-5).slope(loss, seed) == pytest.approx(float(true), rel=1e-5)


def test_a_step_is_the_formula():
    p = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    start = p.detach().clone()
    mezo = MeZO([p], lr=0.1, eps=1e-4, weight_decay=0.5, seed=3)
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(3)))
    (z,) = noise([p], seed)
    above, below = ((start + sign * 1e-4 * z).pow(3).sum() for sign in (1, -1))
    met = mezo.step(lambda: p.pow(3).sum())
    torch.testing.assert_close(p.data, start * (1 - 0.05) - 0.1 * (above - below) / 2e-4 * z)
    assert met == pytest.approx(float(above + below) / 2)


def test_parameters_are_restored_to_the_bit():
    """In bfloat16, where adding and subtracting the noise would not."""
    model, inputs = small().bfloat16(), BACKBONES["llama"].inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    MeZO(trained(model), lr=0.0).step(lambda: output(model, inputs).float().square().mean())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_steps_lower_the_loss_without_a_graph():
    model, inputs = small(), BACKBONES["llama"].inputs()

    def loss():
        found = output(model, inputs).square().mean()
        assert not found.requires_grad
        return found

    with torch.no_grad():
        before = loss()
        base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        mezo = MeZO(trained(model), lr=1e-3, samples=2)
        for _ in range(10):
            mezo.step(loss)
        assert loss() < before
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters() if name in base)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["lora", slow("houlsby"), slow("prefix")])
def test_layer_scales(kind):
    """Two layers, two numbers; at one they change nothing, folded they are gone."""
    model, inputs = small(kind), BACKBONES["llama"].inputs()
    with torch.no_grad():
        before = output(model, inputs)
        scales = layer_scales(model)
        torch.testing.assert_close(output(model, inputs), before, atol=1e-6, rtol=1e-6)
        assert len(scales) == len(trained(model)) == 2
        scales[1].fill_(0.5)
        scaled = output(model, inputs)
        assert (scaled - before).abs().max() > 1e-3
        torch.testing.assert_close(output(merge_projections(model), inputs), scaled, atol=1e-6, rtol=1e-6)


def test_layer_scales_of_a_lora_multiply_b():
    model = small()
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default"
    b = model.get_submodule(key).weight.detach().clone()
    layer_scales(model)[1].data.fill_(0.25)
    torch.testing.assert_close(model.get_submodule(key).weight.detach(), 0.25 * b)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_at_scale(kind):
    model, inputs = small(kind), BACKBONES["llama"].inputs()
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        with model.disable_adapter():
            base = output(model, inputs)
        whole = output(model, inputs)
        found = {}
        for scale in (0.0, 0.5, 1.0):
            with at_scale(AdapterTensors(model), scale):
                found[scale] = output(model, inputs)
        assert torch.equal(found[0.0], base)
        assert torch.equal(found[1.0], whole)
        assert not torch.equal(found[0.5], whole)
        assert torch.equal(output(model, inputs), whole)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert AdapterTensors(small("prefix")).has_prefix
    assert not AdapterTensors(model).has_prefix


# Results


def scored(right, wrong, n):
    """n rows of two answers, the right one first in even rows."""
    rows = [torch.tensor([right, wrong] if i % 2 == 0 else [wrong, right]).log_softmax(0) for i in range(n)]
    return rows, [i % 2 for i in range(n)]


def test_measured():
    found = Measured.of(*scored(2.0, 1.0, 10))
    assert (found.accuracy, found.auc) == (1.0, 1.0)
    assert found.margin == pytest.approx(1.0)
    biased = [torch.tensor([3.0 + i * 0.1 * (1 - 2 * (i % 2)), 0.0]).log_softmax(0) for i in range(10)]
    measured = Measured.of(biased, [i % 2 for i in range(10)])
    assert measured.accuracy == 0.5  # it always says the first
    assert measured.auc == 1.0  # and yet tells them apart


def test_auc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    scores, answers = [torch.randn(2).log_softmax(0) for _ in range(50)], torch.randint(2, (50,)).tolist()
    odds = [float(s[1] - s[0]) for s in scores]
    assert Measured.of(scores, answers).auc == pytest.approx(roc_auc_score(answers, odds))


def test_gain_and_no_gain(tmp_path):
    answers = [0] * 100
    half = [torch.tensor([1.0, 0.0] if i < 50 else [0.0, 1.0]).log_softmax(0) for i in range(100)]
    more = [torch.tensor([1.0, 0.0] if i < 70 else [0.0, 1.0]).log_softmax(0) for i in range(100)]
    base, better = Measured.of(half, answers), Measured.of(more, answers)
    result = PlugInResult.of(base, better, 0.5, {0.0: -0.8, 0.5: -0.7})
    assert result.gains
    assert result.gain == pytest.approx(0.2)
    assert 0.1 < result.low < 0.2 < result.high < 0.3
    assert str(result).startswith("gain: accuracy 0.500 -> 0.700 (+0.200, 95 % interval")
    result.save(tmp_path / "result.json")
    assert PlugInResult.load(tmp_path / "result.json") == result
    same = PlugInResult.of(base, base, 1.0, {})
    assert not same.gains
    assert str(same).startswith("no gain: accuracy 0.500 -> 0.500")
    assert not PlugInResult.of(better, base, 1.0, {}).gains
    assert str(PlugInResult.of(base, base, 0.0, {})).startswith("no gain: scale 0, the untouched large model")
    assert not PlugInResult.of(base, better, 0.0, {}).gains


def test_errors():
    refuses("`parameters` .=0. must hold at least one", ValueError, lambda: MeZO([]))
    p = torch.nn.Parameter(torch.zeros(1))
    refuses("`eps` .=0. must be a positive number", ValueError, lambda: MeZO([p], eps=0))
    refuses("`samples` .=0. must be a positive whole number", ValueError, lambda: MeZO([p], samples=0))
    refuses("must have its projections merged first", ValueError, lambda: layer_scales(plugged_model("llama", "lora")))
    refuses("must be of the same rows", ValueError, lambda: gain_interval([True], [True, False]))
    refuses("`answers` .=1. must be one for each of 2 rows", ValueError, lambda: Measured.of([p, p], [0]))
