"""Several active adapters of a small model, plugged in together: the large model with each of them plugged in alone
and saved, then both loaded and active. In bridges: the plugged model itself.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.pruning import pruned_copy
from hf_peft_ext.transfer import PlugInSettings, Projections, bridge, delta_bridge, merge_projections, plug, plug_in

from .backbones import BACKBONES, output
from .methods import randomise
from .test_transfer_fold import LARGE, refuses, slow
from .test_transfer_plug_in import QUICK, rankings, word_tokenizer

LLAMA = BACKBONES["llama"]
NAMES = ["one", "two"]
PAIRS = {
    "lora": lambda: (LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
                     LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj", "down_proj"])),
    "unipelt": lambda: (UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4),
                        UniPELTConfig(bottleneck_size=3, num_virtual_tokens=2)),
}  # fmt: skip


def large_model():
    return LLAMA.build(**LARGE["llama"])


def small_with_two(kind):
    first, second = PAIRS[kind]()
    small = get_peft_model(LLAMA.build(), first, adapter_name="one")
    small.add_adapter("two", second)
    for seed, name in enumerate(NAMES):
        randomise(small, name, seed=seed)
    small.base_model.set_adapter(NAMES)
    return small.eval()


def loaded(folder):
    """Both adapters of a folder, active."""
    model = PeftModel.from_pretrained(large_model(), folder / "one", adapter_name="one")
    model.load_adapter(folder / "two", "two")
    model.base_model.set_adapter(NAMES)
    return model.eval()


@pytest.mark.parametrize("kind", PAIRS)
def test_several_are_each_of_them(kind, tmp_path):
    small, inputs, projections = small_with_two(kind), LLAMA.inputs(), Projections()
    plugged = plug(small, large_model(), projections).eval()
    assert plugged.active_adapters == NAMES
    with torch.no_grad():
        together = output(plugged, inputs)
        for name in NAMES:
            small.set_adapter(name)
            alone = merge_projections(plug(small, large_model(), projections)).eval()
            assert (output(alone, inputs) - together).abs().max() > 1e-3
            alone.save_pretrained(tmp_path)
        torch.testing.assert_close(output(loaded(tmp_path), inputs), together, atol=1e-5, rtol=1e-5)
        merge_projections(plugged).save_pretrained(tmp_path / "both")
        merged = output(plugged, inputs)
        torch.testing.assert_close(merged, together, atol=1e-5, rtol=1e-5)
        assert torch.equal(output(loaded(tmp_path / "both"), inputs), merged)


@pytest.mark.parametrize("kind", ["lora", slow("unipelt")])
def test_bridges_have_all_of_them(kind):
    plugged, inputs = plug(small_with_two(kind), large_model()).eval(), LLAMA.inputs()
    with torch.no_grad():
        wanted = output(plugged, inputs)
        whole = bridge(plugged, pruned_copy(plugged.get_base_model(), 1))
        torch.testing.assert_close(output(whole, inputs), wanted, atol=1e-5, rtol=1e-4)
    with delta_bridge(plugged, pruned_copy(plugged.get_base_model(), 2)) as held:
        logits = output(held, inputs)
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
        logits.square().mean().backward()
    assert all(p.grad is not None for p in plugged.parameters() if p.requires_grad)


def test_what_is_active_is_carried():
    """Also where peft's wrapper says that another one is active; the other stays in the small model."""
    small, inputs = small_with_two("lora"), LLAMA.inputs()
    small.base_model.set_adapter("two")
    assert small.active_adapter == "one"
    plugged = merge_projections(plug(small, LLAMA.build(), Projections(init="slice"))).eval()
    assert list(plugged.peft_config) == ["two"]
    with torch.no_grad():
        torch.testing.assert_close(output(plugged, inputs), output(small, inputs), atol=1e-5, rtol=1e-5)


def test_a_run_takes_one(tmp_path):
    """It chooses the scale of one adapter; its folder has that adapter itself, whatever its name."""
    small, rows = small_with_two("lora"), rankings(8)
    call = lambda: plug_in(small, large_model(), word_tokenizer(), rows, rows, tmp_path, progress=False)  # noqa: E731
    refuses(r"`active_adapters` .=\['one', 'two'\]. must be one, whose scale is chosen", ValueError, call)
    assert not list(tmp_path.iterdir())
    small.set_adapter("two")
    settings = PlugInSettings(**QUICK, bridge="none")
    model, _ = plug_in(small, large_model(), word_tokenizer(), rows, rows, tmp_path, settings=settings, progress=False)
    assert list(model.peft_config) == ["two"]
    again = PeftModel.from_pretrained(large_model(), tmp_path / "plugged")
    assert again.active_peft_config.r == 2
