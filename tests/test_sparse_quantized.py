"""Sparse adapters on 4-bit models: against the same differences on dequantized weights; selection; refusals."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig

from hf_peft_ext import SparseConfig, select_sparse_parameters
from hf_peft_ext.tuners.sparse.select import sparse_adapter

from .backbones import BACKBONES, output
from .methods import randomise

bitsandbytes = pytest.importorskip("bitsandbytes")
CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def four_bit(tmp_path):
    def load():
        base = BACKBONES["llama"].build(hidden_size=64, intermediate_size=128)
        base.save_pretrained(tmp_path)
        return type(base).from_pretrained(tmp_path, quantization_config=CONFIG, device_map={"": "cpu"}).eval()

    return load


def dequantized(model):
    """The float model with the weights that the 4-bit one computes with."""
    plain = BACKBONES["llama"].build(hidden_size=64, intermediate_size=128)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain.get_submodule(name).weight = nn.Parameter(dequantize_module_weight(module).detach().float())
    return plain


def test_adds_a_sparse_product(four_bit, tmp_path):
    """The same indices and values on the dequantized model give the same outputs, also when saved and loaded."""
    inputs = BACKBONES["llama"].inputs()
    config = SparseConfig(selection="random", density=0.1)
    plain = get_peft_model(dequantized(four_bit()), config).eval()
    model = get_peft_model(four_bit(), SparseConfig(selection="random", density=0.1)).eval()
    randomise(plain)
    randomise(model)
    with torch.no_grad():
        torch.testing.assert_close(output(model, inputs), output(plain, inputs), rtol=1e-3, atol=1e-3)
        plain.save_pretrained(tmp_path / "saved")
        again = PeftModel.from_pretrained(four_bit(), tmp_path / "saved").eval()
        assert torch.equal(output(again, inputs), output(model, inputs))
    model.train()
    output(model, inputs).square().mean().backward()
    assert sparse_adapter(model, None)[0].deltas_of["default"].values.grad.isfinite().all()


def test_fisher_reads_the_gradient_of_quantized_weights(four_bit):
    """The selected entries are those of the dequantized model."""
    ids = BACKBONES["llama"].inputs()["input_ids"]
    chosen = []
    for base in (four_bit(), dequantized(four_bit())):
        model = get_peft_model(base, SparseConfig(num_values=300))
        select_sparse_parameters(model, [{"input_ids": ids, "labels": ids}])
        chosen.append(set(sparse_adapter(model, None)[0].deltas_of["default"].indices.tolist()))
    assert len(chosen[0] & chosen[1]) > 290


def test_merging_into_quantized_weights_is_refused(four_bit):
    model = get_peft_model(four_bit(), SparseConfig(selection="random", density=0.1)).eval()
    inputs = BACKBONES["llama"].inputs()
    before = output(model, inputs)
    with pytest.raises(ValueError, match=r"The weight of .*q_proj is quantized, so its entries cannot be merged"):
        model.merge_adapter()
    assert torch.equal(output(model, inputs), before)
