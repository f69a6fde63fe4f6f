"""The delta bridge and MeZO on a large model in 4 bits: the plugged model's own logits, gradients, a plain adapter."""

import pytest
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig

from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.pruning import pruned_copy
from hf_peft_ext.transfer import MeZO, delta_bridge, merge_projections, plug
from hf_peft_ext.transfer.refine.mezo import trained

from .backbones import BACKBONES, output
from .test_transfer_fold import slow, small_model

pytest.importorskip("bitsandbytes")

WIDE = {  # several 4-bit blocks
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 8},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 8},
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8},
    "t5": {"d_model": 64, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 8, "d_kv": 8},
}  # fmt: skip


def in_4_bits(family, folder):
    model = BACKBONES[family].build(**WIDE[family])
    model.save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return type(model).from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()


@pytest.mark.parametrize("kind", ["lora", slow("houlsby"), slow("prefix")])
@pytest.mark.parametrize("family", ["gpt2", slow("llama"), slow("bert"), slow("t5")])
def test_delta_bridge(family, kind, tmp_path):
    inputs, large = BACKBONES[family].inputs(), in_4_bits(family, tmp_path / "large")
    pruned = pruned_copy(large, 4)
    plugged = plug(small_model(family, kind), large).eval()
    before = [p.detach().clone() for p in large.parameters() if not p.requires_grad]
    with torch.no_grad():
        wanted = output(plugged, inputs)
    with delta_bridge(plugged, pruned) as model:
        optimizer = torch.optim.AdamW(trained(model), 1e-3)
        found = output(model, inputs)
        torch.testing.assert_close(
            found, wanted[..., pruned.kept["residual"]] if family == "bert" else wanted, atol=1e-5, rtol=1e-4
        )
        found.square().mean().backward()
        optimizer.step()
    frozen = [p for p in large.parameters() if not p.requires_grad]
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
    assert all(p.grad is not None for p in trained(plugged))
    with torch.no_grad():
        wanted = output(merge_projections(plugged), inputs)
    plugged.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(in_4_bits(family, tmp_path / "large"), tmp_path / "adapter").eval()
    keep_4bit_trainable(again)  # repacked weights are multiplied in 16 bits
    with torch.no_grad():
        torch.testing.assert_close(output(again, inputs), wanted, atol=1e-5, rtol=1e-5)


def test_mezo(tmp_path):
    inputs = BACKBONES["gpt2"].inputs()
    plugged = plug(small_model("gpt2", "lora"), in_4_bits("gpt2", tmp_path)).eval()
    before = [p.detach().clone() for p in trained(plugged)]
    MeZO(trained(plugged)).step(lambda: output(plugged, inputs).square().mean())
    assert not any(torch.equal(p, q) for p, q in zip(trained(plugged), before, strict=True))


def test_a_packed_gpt2_is_cut_as_it_stands(tmp_path):
    """Its leaves are turned round when they are packed; those of the copy are not."""
    large = in_4_bits("gpt2", tmp_path)
    whole = pruned_copy(large, 1).model.eval()
    inputs = BACKBONES["gpt2"].inputs()
    with torch.no_grad():
        torch.testing.assert_close(output(whole, inputs), output(large, inputs), atol=1e-5, rtol=1e-4)
