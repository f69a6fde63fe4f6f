"""A base model in 16 bits with an adapter in float32, as peft makes it: bridges give the plugged model's own logits,
and every way of training has finite gradients.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_peft_ext.pruning import pruned_copy
from hf_peft_ext.transfer import MeZO, Projections, bridge, delta_bridge, layer_scales, merge_projections, plug
from hf_peft_ext.transfer.refine.mezo import trained

from .backbones import BACKBONES, SPECIAL, output
from .methods import randomise
from .test_transfer_fold import KINDS, LARGE, slow

TYPES = [torch.bfloat16, torch.float16]
PAIRS = [("llama", "lora"), ("bert", "bottleneck"), slow(("gpt2", "houlsby")), slow(("t5", "lora")),
         slow(("gpt2", "lora")), slow(("llama", "unipelt")), slow(("llama", "prefix"))]  # fmt: skip
ROUNDING = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=TYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=PAIRS, ids=str)
def case(request):
    return request.param


def small_in(dtype, family, kind, **kwargs):
    small = get_peft_model(BACKBONES[family].build().to(dtype), KINDS[kind](family), **kwargs).eval()
    randomise(small, std=0.05)
    return small


def plugged_in(dtype, family, kind, projections=None, **kwargs):
    torch.manual_seed(0)
    small, large = small_in(dtype, family, kind), BACKBONES[family].build(**LARGE[family]).to(dtype)
    return plug(small, large, projections, **kwargs).eval()


def check_gradients(model, inputs):
    """They are finite. No step is taken: AdamW's epsilon is 0 in float16, so a gradient of 0 makes a weight NaN."""
    output(model, inputs).float().square().mean().backward()
    gradients = [p.grad for p in trained(model) if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("around", ["plugged", "base"])
def test_delta_bridge(case, dtype, around):
    family, _ = case
    plugged, inputs = plugged_in(dtype, *case), BACKBONES[family].inputs()
    assert {p.dtype for p in trained(plugged)} == {torch.float32}
    with torch.no_grad():
        wanted = output(plugged, inputs)
        pruned = pruned_copy(plugged.get_base_model(), 1 if around == "base" else 4)
    with delta_bridge(plugged, pruned, around) as held:
        found = output(held, inputs)
        wanted = wanted[..., pruned.kept["residual"]] if family == "bert" else wanted
        atol = ROUNDING[dtype] * float(wanted.abs().max()) * (3 if around == "base" else 1)  # which adds up changes
        torch.testing.assert_close(found, wanted, atol=atol, rtol=0)
        check_gradients(held, inputs)


@pytest.mark.parametrize("ladder", [False, slow(True)])
def test_papers_bridge(case, dtype, ladder, tmp_path):
    family, _ = case
    plugged, inputs = plugged_in(dtype, *case), BACKBONES[family].inputs()
    pruned = pruned_copy(plugged.get_base_model(), 2)
    for _ in range(2):  # the second reads the files
        check_gradients(
            bridge(plugged, pruned, init="orthogonal", ladder=ladder, cache=tmp_path if ladder else None), inputs
        )
        pruned = pruned_copy(plugged.get_base_model(), 2)


def test_merged_and_loaded(case, dtype, tmp_path):
    family, _ = case
    plugged, inputs = plugged_in(dtype, *case), BACKBONES[family].inputs()
    with torch.no_grad():
        before = output(plugged, inputs)
        merged = output(merge_projections(plugged), inputs)
    torch.testing.assert_close(merged, before, atol=ROUNDING[dtype] * float(before.abs().max()), rtol=0)
    assert {p.dtype for p in trained(plugged)} == {torch.float32}
    plugged.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BACKBONES[family].build(**LARGE[family]).to(dtype), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output(again, inputs), merged)


def test_mezo_and_scales(dtype):
    model, inputs = merge_projections(plugged_in(dtype, "llama", "lora")), BACKBONES["llama"].inputs()
    loss = lambda: output(model, inputs).float().square().mean()  # noqa: E731
    before = [p.detach().clone() for p in trained(model)]
    MeZO(trained(model)).step(loss)
    assert not any(torch.equal(p, q) for p, q in zip(trained(model), before, strict=True))
    scales = layer_scales(model)
    MeZO(scales, lr=1.0).step(loss)
    assert all(float(scale.detach()) != 1 for scale in scales)
    with torch.no_grad():
        assert output(merge_projections(model), inputs).isfinite().all()


def test_least_squares(dtype):
    """The W_plug of the same models in float32, up to rounding."""
    batches = [{"input_ids": torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0))}]
    weights = []
    for of in (dtype, torch.float32):
        projections = Projections("least_squares")
        plugged_in(of, "llama", "lora", projections, batches=batches)
        weights.append(projections.of["residual_out"].weight)
    assert torch.nn.functional.cosine_similarity(weights[0].flatten(), weights[1].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_an_adapter_in_16_bits_on_models_of_other_types(kind, dtype):
    """Copies have the type of the adapter in the large model; the one in the small model stays in 16 bits."""
    small, inputs = small_in(dtype, "llama", kind, autocast_adapter_dtype=False), BACKBONES["llama"].inputs()
    for of in (torch.float32, dtype):
        plugged = plug(small, BACKBONES["llama"].build(**LARGE["llama"]).to(of)).eval()
        assert {p.dtype for p in trained(plugged)} == {torch.float32}
        check_gradients(plugged, inputs)
    assert {p.dtype for p in trained(small)} == {dtype}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_delta_bridge_with_a_head(family):
    """A leaf of a head that reads another leaf's output: its input in the large model, not that of the head."""

    def model(**sizes):
        torch.manual_seed(0)
        config = {**SPECIAL, **BACKBONES[family].config, "vocab_size": 60, "num_labels": 2, **sizes}
        return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **config))

    small = get_peft_model(model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    randomise(small)
    large, inputs = model(**LARGE["bert"]), BACKBONES[family].inputs()
    pruned = pruned_copy(large, 2)
    plugged = plug(small, large).eval()
    with torch.no_grad():
        wanted = output(plugged, inputs)
        with delta_bridge(plugged, pruned) as held:
            torch.testing.assert_close(output(held, inputs), wanted, atol=1e-5, rtol=1e-4)
