"""torch.save, half precision and a switch of the attention implementation leave an adapter's outputs as they are."""

import pytest
import torch
from peft import TaskType, get_peft_model
from transformers import AutoModelForCausalLM

from hf_peft_ext import UniPELTConfig

from .backbones import BACKBONES, output
from .methods import METHODS, randomise
from .tuned_models import every_method, families, tuned

# pickle, precision, attention


@every_method
@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_whole_model_survives_torch_save(method, backbone, tmp_path):
    """torch.save and torch.load of a whole PeftModel give the same outputs, and still disable and unload."""
    model, inputs, expected = tuned(method, backbone)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(output(again, inputs), expected)
        base = output(BACKBONES[backbone].build(), inputs)
        with again.disable_adapter():
            assert torch.equal(output(again, inputs), base)
        assert torch.equal(output(again.unload(), inputs), base)


@every_method
@families
def test_half_precision_base(method, backbone):
    """On a bfloat16 base the adapter is float32 (peft's autocast_adapter_dtype); outputs are near float32's."""
    family = BACKBONES[backbone]
    inputs = family.inputs()
    model = get_peft_model(family.build().to(torch.bfloat16), METHODS[method]())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    randomise(model)
    _, _, expected = tuned(method, backbone)
    y = output(model.eval(), inputs)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.1 * expected.norm()
    y.float().square().mean().backward()
    dead = ("pooler", "is_decoder")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in dead):
            assert parameter.grad.isfinite().all(), name


def test_half_precision_without_autocast_keeps_the_type():
    """autocast_adapter_dtype=False leaves the adapter in the base model's type."""
    model = get_peft_model(
        BACKBONES["llama"].build().to(torch.bfloat16), METHODS["unipelt"](), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    output(model, BACKBONES["llama"].inputs()).float().square().mean().backward()


@pytest.mark.parametrize("method", ["unipelt", "unipelt_paper", "projected_prefix"])
@pytest.mark.parametrize("backbone", ["bert", "llama", "t5", "gpt2"])
def test_switch_to_eager_attention(method, backbone):
    """After set_attn_implementation("eager") the outputs stay, and the attention weights have the usual shape."""
    model, inputs, expected = tuned(method, backbone)
    model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        result = model(**inputs, output_attentions=True)
        usual = BACKBONES[backbone].build(attention="eager")(**inputs, output_attentions=True)
    y = result.logits if "logits" in result else result.last_hidden_state
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for name in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        if name in usual:
            assert [a.shape for a in result[name]] == [a.shape for a in usual[name]], name
            # what is missing from 1 is what went to a prefix under the same softmax
            sums = [a.sum(-1) for a in result[name]]
            assert all((s < 1).all() if method != "unipelt" else ((s - 1).abs() < 1e-5).all() for s in sums)
    model.get_base_model().set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(output(model, inputs), expected)


def test_causal_model_loads_by_transformers_from_a_peft_folder(tmp_path):
    """AutoModelForCausalLM.from_pretrained on a PeftModel's folder gives a bare model with the adapter inside."""
    BACKBONES["llama"].build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, UniPELTConfig(bottleneck_size=4, task_type=TaskType.CAUSAL_LM))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    inputs = BACKBONES["llama"].inputs()
    with torch.no_grad():
        torch.testing.assert_close(output(again, inputs), output(model.eval(), inputs), rtol=0, atol=1e-5)
