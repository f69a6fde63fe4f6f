"""Bridges: the delta bridge against the large model itself, in its logits, inside, and (with nothing cut) in the
gradients of the module; the paper's bridge against products of slices; no gradient ever reaches the large model.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_peft_ext.pruning import pruned_copy
from hf_peft_ext.transfer import Projections, bridge, delta_bridge, merge_projections, plug

from .backbones import BACKBONES, output
from .test_transfer_fold import FAST, LARGE, plugged_model, refuses, slow, small_model

KINDS = ["lora", "bottleneck", "houlsby", "prefix", "unipelt"]
LAST = {"gpt2": "transformer.h.4", "llama": "model.layers.4", "bert": "encoder.layer.2", "t5": "decoder.block.3"}
every_pair = pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=[] if (family, kind) in FAST else pytest.mark.slow)
        for family in LARGE
        for kind in KINDS
    ],
)


def inside(model, path, inputs):
    """What a block gives."""
    found = []
    module = model.get_base_model().get_submodule(path)
    handle = module.register_forward_hook(lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    logits = output(model, inputs)
    handle.remove()
    return logits.detach(), found[-1].detach()


@every_pair
def test_delta_bridge_is_the_plugged_model(family, kind):
    """In its logits, and in the channels that it has of the residual stream."""
    plugged, inputs = plugged_model(family, kind), BACKBONES[family].inputs()
    with torch.no_grad():
        logits, stream = inside(plugged, LAST[family], inputs)
        pruned = pruned_copy(plugged.get_base_model(), 4)
        kept = pruned.kept["residual"]
        with delta_bridge(plugged, pruned) as model:
            found, pruned_stream = inside(model, LAST[family], inputs)
        again = output(plugged, inputs)
    torch.testing.assert_close(found, logits[..., kept] if family == "bert" else logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pruned_stream, stream[..., kept], atol=1e-4, rtol=1e-4)
    assert torch.equal(again, logits)
    assert not any(m._forward_hooks for name, m in plugged.named_modules() if name.endswith("lm_head"))


@pytest.mark.slow
@every_pair
def test_delta_bridge_around_the_base_is_the_base_without_the_module(family, kind):
    plugged, inputs = plugged_model(family, kind), BACKBONES[family].inputs()
    pruned = pruned_copy(plugged.get_base_model(), 2)
    with torch.no_grad(), plugged.disable_adapter():
        base, stream = inside(plugged, LAST[family], inputs)
    with torch.no_grad(), delta_bridge(plugged, pruned, around="base") as model:
        changed = output(model, inputs)
        with model.disable_adapter():
            found, pruned_stream = inside(model, LAST[family], inputs)
    kept = pruned.kept["residual"]
    base = base[..., kept] if family == "bert" else base
    torch.testing.assert_close(found, base, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pruned_stream, stream[..., kept], atol=1e-4, rtol=1e-4)
    assert (changed - base).abs().max() > 1e-3


@pytest.mark.parametrize("around", ["plugged", slow("base")])
@every_pair
def test_with_nothing_cut_the_gradient_is_the_plugged_models(family, kind, around):
    plugged, inputs = plugged_model(family, kind), BACKBONES[family].inputs()
    with delta_bridge(plugged, pruned_copy(plugged.get_base_model(), 1), around) as model:
        parameters = [p for p in model.parameters() if p.requires_grad]
        through = torch.autograd.grad(output(model, inputs).square().mean(), parameters)
    true = torch.autograd.grad(output(plugged, inputs).square().mean(), parameters)
    for found, wanted in zip(through, true, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("kind", [slow(kind) if kind != "lora" else kind for kind in KINDS])
def test_pruned_gradient_points_the_plugged_models_way(kind):
    """A step along it lowers the plugged model's own loss; with half of the width, in Llama."""
    plugged, inputs = plugged_model("llama", kind), BACKBONES["llama"].inputs()
    with delta_bridge(plugged, pruned_copy(plugged.get_base_model(), 2)) as model:
        loss = output(model, inputs).square().mean()
        loss.backward()
    with torch.no_grad():
        trained = [p for p in plugged.parameters() if p.requires_grad and p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        for p in trained:
            p.sub_(1e-2 * p.grad / norm)
        assert output(plugged, inputs).square().mean() < loss


def trained_in(build, steps=3):
    """A few steps of training in a bridge; which parameters of the plugged model changed, and which had gradients."""
    plugged, inputs = plugged_model("llama", "lora"), BACKBONES["llama"].inputs()
    before = {name: p.detach().clone() for name, p in plugged.named_parameters()}
    with build(plugged) as model:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            output(model, inputs).square().mean().backward()
            optimizer.step()
    grads = {name for name, p in plugged.named_parameters() if p.grad is not None}
    return plugged, {name for name, p in plugged.named_parameters() if not torch.equal(p, before[name])}, grads


class Paper:
    """The paper's bridge, as a context like the delta bridge."""

    def __init__(self, plugged, **kwargs):
        self.model = bridge(plugged, pruned_copy(plugged.get_base_model(), 2), **kwargs)

    def __enter__(self):
        return self.model

    def __exit__(self, *_):
        return None


BRIDGES = {
    "paper": Paper,
    "delta": lambda plugged: delta_bridge(plugged, pruned_copy(plugged.get_base_model(), 2)),
    "delta around base": lambda plugged: delta_bridge(plugged, pruned_copy(plugged.get_base_model(), 2), "base"),
}


@pytest.mark.parametrize("name", BRIDGES)
def test_large_model_is_never_trained(name):
    """Only the narrow copies and W_plug change; no parameter of the large model itself gets a gradient."""
    plugged, changed, grads = trained_in(BRIDGES[name])
    assert changed
    assert all(".parametrizations." in path for path in changed | grads)
    assert {path.rpartition(".")[2] for path in changed} == {"original", "weight"}  # the copies, and W_plug
    assert not any(p.requires_grad for path, p in plugged.named_parameters() if ".parametrizations." not in path)


def test_papers_bridge_sees_slices():
    """A'' = A' [:, kept] and B'' = B' [kept, :] of the plugged model, and trains the pruned copy with them."""
    plugged = plugged_model("llama", "lora")
    pruned = pruned_copy(plugged.get_base_model(), 2)
    model = bridge(plugged, pruned)
    key = "base_model.model.model.layers.3.self_attn.v_proj.lora_"
    a, b = (plugged.get_submodule(f"{key}{side}.default").weight for side in "AB")
    rows = pruned.rows_of("model.layers.3.self_attn.v_proj")
    torch.testing.assert_close(model.get_submodule(f"{key}A.default").weight, a[:, pruned.kept["residual"]])
    torch.testing.assert_close(model.get_submodule(f"{key}B.default").weight, b[rows])
    own = [p for name, p in model.named_parameters() if "lora_" not in name]
    assert all(p.requires_grad for p in own)


def test_papers_bridge_trains_w_down():
    plugged = plugged_model("gpt2", "lora")
    pruned = pruned_copy(plugged.get_base_model(), 2)
    model = bridge(plugged, pruned, init="orthogonal", train_bridge=False)
    known = {id(p) for p in plugged.parameters()}
    down = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    output(model, BACKBONES["gpt2"].inputs()).square().mean().backward()
    assert down
    assert all(p.grad is not None for p in down)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


def test_bridge_without_a_small_model():
    """A fresh LoRA on the large model, trained in a delta bridge: what is trained is the plain adapter."""
    large = get_peft_model(BACKBONES["llama"].build(**LARGE["llama"]), LoraConfig(r=2, target_modules=["q_proj"]))
    with delta_bridge(large, pruned_copy(large.get_base_model(), 2)) as model:
        output(model, BACKBONES["llama"].inputs()).square().mean().backward()
    assert all(p.grad is not None for p in large.parameters() if p.requires_grad)


def test_folded_after_training_is_what_was_trained():
    plugged, _, _ = trained_in(BRIDGES["delta"])
    inputs = BACKBONES["llama"].inputs()
    with torch.no_grad():
        before = output(plugged, inputs)
        torch.testing.assert_close(output(merge_projections(plugged), inputs), before, atol=1e-5, rtol=1e-5)


def test_errors():
    plugged = plugged_model("llama", "lora")
    other = pruned_copy(BACKBONES["gpt2"].build(), 2)
    refuses("`pruned` .='GPT2LMHeadModel'. must be a copy of the large", ValueError, lambda: bridge(plugged, other))

    def enter(around):
        with delta_bridge(plugged, pruned_copy(plugged.get_base_model(), 2), around):
            pass

    refuses("`around` .='small'. must be one of plugged, base", ValueError, lambda: enter("small"))


def test_small_model_is_left_alone():
    small = small_model("llama", "lora")
    state = {name: value.clone() for name, value in small.state_dict().items()}
    plugged = plug(small, BACKBONES["llama"].build(**LARGE["llama"]), Projections())
    with delta_bridge(plugged, pruned_copy(plugged.get_base_model(), 2)) as model:
        output(model, BACKBONES["llama"].inputs()).square().mean().backward()
    assert all(torch.equal(state[name], value) for name, value in small.state_dict().items())
    assert all(p.grad is None for p in small.parameters())
