"""load_backbone: every method on 4 and 8 bits against the same on a fresh model, and on models in other precisions."""

import bitsandbytes
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from hf_peft_ext import load_backbone
from hf_peft_ext.model import backbone as module

from .backbones import BACKBONES, output
from .methods import ALL, METHODS, randomise
from .test_quantized import WIDE, assert_same, folders, gradients, without_dropout  # noqa: F401

QUANTIZED = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
SEQUENCE_CLASSIFIERS = {  # family -> its heads
    "bert": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "llama": {"score"},
    "bart": {"classification_head.dense", "classification_head.out_proj"},
}
MERGEABLE = {**{name: METHODS[name] for name in ("lora_branch", "bitfit")}, "tfew": ALL["tfew"], "lora": LoraConfig}
every_method = pytest.mark.parametrize(
    "method", [name for name in ALL if name not in ("intrinsic", "said")]
)  # refused
every_width = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture
def llama(folders):  # noqa: F811
    """Loads the tiny Llama."""
    return lambda bits=4, **kwargs: load_backbone(folders("llama"), bits, **kwargs)


def inputs():
    return BACKBONES["llama"].inputs()


def leaves(model, kinds=QUANTIZED):
    return {name for name, leaf in model.named_modules() if isinstance(leaf, kinds)}


@every_width
@every_method
def test_trained_and_reloaded(method, bits, llama, tmp_path):
    """All adapter weights train; trained for a step, saved and reloaded on a fresh model, the outputs are equal."""
    model = get_peft_model(llama(bits), ALL[method]())
    randomise(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trained = gradients(model.train(), inputs())
    assert all(g.abs().max() > 0 for name, g in trained.items() if "key" not in name)  # softmax ignores some of these
    optimizer.step()
    with torch.no_grad():
        expected = output(model.eval(), inputs())
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(llama(bits), tmp_path).eval()
        assert torch.equal(output(again, inputs()), expected)


@every_method
def test_reloaded_on_another_precision(method, llama, tmp_path):
    """An adapter of an NF4 model loads unchanged on other precisions; outputs move about as far as the base's."""
    model = get_peft_model(llama(4), ALL[method]()).eval()
    randomise(model, std=0.05)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        expected, base = output(model, inputs()), output(llama(4), inputs())
        for bits, options in (
            (8, {}),
            (None, {}),
            (None, {"compute_dtype": torch.bfloat16}),
            (4, {"quant_type": "fp4"}),
        ):
            other = llama(bits, **options).eval()
            apart = (output(other, inputs()) - base).norm()
            again = PeftModel.from_pretrained(other, tmp_path).eval()
            assert all(torch.equal(saved[name], value) for name, value in get_peft_model_state_dict(again).items())
            assert (output(again, inputs()) - expected).norm() < 2 * apart, (bits, options)


@every_width
@pytest.mark.parametrize("method", ["unipelt", "mam", "tfew", "ladder"])
def test_checkpointing_changes_no_gradient(method, bits, llama):
    """Gradients are those without checkpointing, though the embeddings' output asks for none."""

    def of(checkpointing):
        model = get_peft_model(llama(bits, gradient_checkpointing=checkpointing), ALL[method]())
        randomise(model)
        without_dropout(model)
        assert model.base_model.model.is_gradient_checkpointing is checkpointing
        return gradients(model.train(), inputs())

    assert_same(of(False), of(True))


@every_width
@pytest.mark.parametrize("family", SEQUENCE_CLASSIFIERS)
def test_heads_are_not_quantized(family, bits, tmp_path):
    """A classifier's head stays in float32 and is trained with the adapter; all other linear leaves are quantized."""
    wide = {"distilbert": {"dim": 64}, "bart": {"d_model": 64}}.get(family, {"hidden_size": 64})
    config = transformers.AutoConfig.for_model(
        family, **{**BACKBONES[family].config, **wide}, pad_token_id=0, num_labels=3
    )
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = load_backbone(tmp_path, bits, task_type="SEQ_CLS")
    heads = SEQUENCE_CLASSIFIERS[family]
    assert leaves(model, torch.nn.Linear) - leaves(model) == heads
    assert len(leaves(model)) > 8
    tuned = get_peft_model(model, METHODS["bitfit"](task_type="SEQ_CLS", modules_to_save=[min(heads).split(".")[0]]))
    head = [p for name, p in tuned.named_parameters() if "modules_to_save" in name]
    assert head
    assert all(p.requires_grad and p.dtype == torch.float32 for p in head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(dtype, llama):
    """Products in the chosen type; norms, embeddings, head and adapter in float32; nothing but the adapter trained."""
    base = llama(4, compute_dtype=dtype)
    assert not any(p.requires_grad for p in base.parameters())
    model = get_peft_model(base, METHODS["unipelt"]())
    leaf = next(m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    assert leaf.compute_dtype == dtype
    assert leaf.weight.quant_type == "nf4"
    assert leaf.weight.quant_state.nested
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    assert {p.dtype for p in llama(None, compute_dtype=dtype).parameters()} == {dtype}


def test_options(llama, tmp_path):
    """FP4 without double quantization, further unquantized modules, another class, arguments of from_pretrained."""
    model = llama(4, quant_type="fp4", double_quantization=False, skip_modules=["down_proj"])
    leaf = next(m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    assert leaf.weight.quant_type == "fp4"
    assert not leaf.weight.quant_state.nested
    assert leaves(model)
    assert not any("down_proj" in name for name in leaves(model))
    assert "lm_head" in leaves(model, torch.nn.Linear) - leaves(model)
    other = llama(None, auto_class=transformers.AutoModel, attn_implementation="eager", gradient_checkpointing=True)
    assert type(other).__name__ == "LlamaModel"
    assert other.config._attn_implementation == "eager"
    assert other.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore:The merged model has biases:UserWarning")
@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_into_a_dequantized_base(method, llama, tmp_path):
    """On the dequantized base model the adapter gives the outputs of training, and merging changes none of them."""
    model = get_peft_model(llama(4), MERGEABLE[method]()).eval()
    randomise(model, std=0.1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected, base = output(model, inputs()), output(llama(4), inputs())
        dequantized = llama(4).dequantize()
        dequantized.is_loaded_in_4bit = False  # transformers leaves it, and (IA)^3's merge asks for it
        again = PeftModel.from_pretrained(dequantized, tmp_path).eval()
        torch.testing.assert_close(output(again, inputs()), expected, rtol=0, atol=1e-5)
        merged = again.merge_and_unload()
        torch.testing.assert_close(output(merged, inputs()), expected, rtol=0, atol=1e-4)
    assert (expected - base).abs().max() > 0.05
    assert not leaves(merged)


def test_a_tuned_model_is_not_dequantized(llama):
    """transformers would replace the leaves together with the tuner layers on them: an error, nothing is changed."""
    model = get_peft_model(llama(4), METHODS["unipelt"]()).eval()
    randomise(model)
    with torch.no_grad():
        expected = output(model, inputs())
        with pytest.raises(
            ValueError, match=r"A model with an adapter cannot be dequantized\. Save the adapter, call"
        ):
            model.dequantize()
        assert torch.equal(output(model, inputs()), expected)


@pytest.mark.parametrize(
    ("bits", "options", "message"),
    [
        (3, {}, r"`bits` \(=3\) must be 4, 8 or None\."),
        (4, {"task_type": "CLM"}, r"`task_type` \(='CLM'\) must be one of CAUSAL_LM, SEQ_2_SEQ_LM"),
        (4, {"quant_type": "int4"}, r"`quant_type` \(='int4'\) must be nf4 or fp4\."),
        (4, {"quantization_config": None}, r"`quantization_config` \(=None\) must be left to `bits`; for a config of"),
    ],
)
def test_refuses(bits, options, message):
    """Wrong arguments are refused before a file is read."""
    with pytest.raises(ValueError, match=message):
        load_backbone("nowhere", bits, **options)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r"`bits` \(=8\) needs bitsandbytes: pip install 'hf_peft_ext\[quantized\]'"):
        load_backbone("nowhere", 8)
