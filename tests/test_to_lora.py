"""`to_lora` and `peft.convert_to_lora` where a LoRA equals the adapter: outputs beside the adapter's, on all kinds of
models, and in a process that has peft alone.
"""

import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.lora.conversion import save_as_lora
from transformers import AutoModelForSequenceClassification, BertConfig

from hf_peft_ext import (
    BitFitConfig,
    ComposedConfig,
    LadderConfig,
    Placement,
    S4Config,
    TFewConfig,
    UniPELTConfig,
    fix_gates,
    to_lora,
)

from .backbones import BACKBONES, PLAIN, VOCAB, D, output
from .methods import METHODS, randomise

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # peft, of GPT-2


def low_rank(**kwargs):
    return UniPELTConfig(methods=("lora",), gated=False, r=2, **kwargs)


def side_by_side(**kwargs):
    """Several branches at one leaf where queries, keys and values are fused, and different ranks."""
    sites = ("query", "key", "value", "attention_output", "ffn_output")
    return ComposedConfig(
        placements=[Placement("low_rank", site, options={"r": 1 + i, "alpha": 3}) for i, site in enumerate(sites)],
        **kwargs,
    )


def low_rank_groups(**kwargs):
    return S4Config(grouping="uniform", strategies=[("lora",), ("lora",)], budget=0.1, **kwargs)


EXACT = {"low_rank": low_rank, "side_by_side": side_by_side, "s4": low_rank_groups}


def adapted(backbone, config):
    model = get_peft_model(BACKBONES[backbone].build(), config)
    randomise(model)
    return model.eval()


@torch.no_grad()
def outputs(backbone, model):
    return output(model, BACKBONES[backbone].inputs())


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("backbone", ["bert", "gpt2", "t5", "llama"])
def test_exact(tmp_path, backbone, method):
    """Loaded by peft into a fresh base model, and merged, the outputs are the adapter's."""
    model = adapted(backbone, EXACT[method]())
    expected = outputs(backbone, model)
    export = to_lora(model, tmp_path, progress=None)
    assert export.exact
    assert export.fidelity is None
    assert torch.equal(outputs(backbone, model), expected)  # the model is unchanged
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"] == export.r
    assert not config["rank_pattern"]
    loaded = PeftModel.from_pretrained(BACKBONES[backbone].build(), tmp_path).eval()
    torch.testing.assert_close(outputs(backbone, loaded), expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(backbone, merged), expected, rtol=1e-5, atol=1e-5)
    assert "without training: the same function" in (tmp_path / "README.md").read_text()


def test_fixed_gates(tmp_path):
    """A gated branch equals no LoRA; with a constant gate it does."""
    model = adapted("bert", UniPELTConfig(methods=("lora",), r=2))
    with pytest.raises(ValueError, match=r"`texts` \(=None\) must be given, to distil the adapter on: `adapter_name`"):
        to_lora(model, tmp_path / "gated", progress=None)
    assert not model.supports_lora_conversion()
    fix_gates(model, BACKBONES["bert"].inputs())
    assert model.supports_lora_conversion()
    expected = outputs("bert", model)
    assert to_lora(model, tmp_path, progress=None).exact
    loaded = PeftModel.from_pretrained(BACKBONES["bert"].build(), tmp_path).eval()
    torch.testing.assert_close(outputs("bert", loaded), expected, rtol=1e-5, atol=1e-5)


def few_entries(model, entries):
    """Vectors of (IA)^3 that are one but for some entries."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, vector in model.named_parameters():
            if ".ia3_l." in name:
                vector.fill_(1.0).view(-1)[:entries].add_(torch.randn(entries))
    return model.eval()


@pytest.mark.parametrize(("backbone", "entries"), [("t5", 3), ("t5", None), ("llama", 5)])
def test_ia3(tmp_path, backbone, entries):
    """Without biases a scaled weight is an update of as high a rank as entries changed, up to the leaf's width."""
    model = get_peft_model(BACKBONES[backbone].build(), TFewConfig())
    few_entries(model, entries or 64) if entries else randomise(model)
    model.eval()
    expected = outputs(backbone, model)
    rank = entries or D
    with pytest.raises(ValueError, match=rf"equals the adapter has rank {rank}, above `r` \(={rank - 1}\)"):
        to_lora(model, tmp_path, r=rank - 1, progress=None)
    export = to_lora(model, tmp_path, r=rank, progress=None)
    assert (export.exact, export.r) == (True, rank)
    loaded = PeftModel.from_pretrained(BACKBONES[backbone].build(), tmp_path).eval()
    torch.testing.assert_close(outputs(backbone, loaded), expected, rtol=1e-5, atol=1e-5)


def test_ia3_beside_a_bias(tmp_path):
    """A scaled bias is no update of a weight: (IA)^3 on GPT-2's projections has no LoRA that equals it."""
    model = few_entries(adapted("gpt2", TFewConfig()), 2)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None and "Conv1D" in type(module).__name__:
                module.bias.fill_(0.1)
    with pytest.raises(ValueError, match=r"updates of weights: transformer\.h\.0\.attn\.c_attn \(Linear\)"):
        to_lora(model, tmp_path, progress=None)


@pytest.mark.parametrize("config", [BitFitConfig, METHODS["pfeiffer"], METHODS["unipelt"], lambda: LadderConfig(r=4)])
def test_what_equals_no_lora(tmp_path, config):
    """It needs texts to be distilled on, and peft's conversion refuses it with the reason."""
    model = adapted("llama", config())
    with pytest.raises(ValueError, match="to distil the adapter on"):
        to_lora(model, tmp_path / "lora", progress=None)
    assert not (tmp_path / "lora").exists()
    with pytest.raises(TypeError, match=r"not low-rank updates of weights: .*[^.]\. `hf_peft_ext\.to_lora` trains"):
        peft.convert_to_lora(model, 4)
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("backbone", ["bert", "gpt2", "llama"])
def test_convert_to_lora(tmp_path, backbone, method):
    """peft's own function, for a rank that suffices."""
    model = adapted(backbone, EXACT[method]())
    assert model.supports_lora_conversion()
    rank = D if backbone == "gpt2" else D // 2  # three branches at one leaf; keys of half the width
    _, state = peft.convert_to_lora(model, rank)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state)
    save_as_lora(tmp_path, model, rank)
    loaded = PeftModel.from_pretrained(BACKBONES[backbone].build(), tmp_path).eval()
    torch.testing.assert_close(outputs(backbone, loaded), outputs(backbone, model), rtol=1e-4, atol=1e-4)


def test_convert_to_lora_truncates():
    """A rank below the adapter's leaves the largest singular values; a share chooses a rank for each leaf."""
    model = adapted("llama", low_rank())
    _, state = peft.convert_to_lora(model, 1)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.query_low_rank.sublayer_of["default"]
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    u, s, v = torch.linalg.svd(layer.delta_weight().detach())
    product = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    torch.testing.assert_close(product, s[0] * u[:, :1] @ v[:1], rtol=1e-4, atol=1e-5)
    config, _ = peft.convert_to_lora(model, 0.999)
    assert {*config.rank_pattern.values()} <= {1, 2}
    with pytest.raises(ValueError, match="rank of 0"):
        peft.convert_to_lora(model, 0)


def test_convert_to_lora_of_other_adapters():
    """Adapters of peft's other types go to its own function; one of (IA)^3 is converted as ours are."""
    loha = get_peft_model(BACKBONES["llama"].build(), peft.LoHaConfig(target_modules=["q_proj"]))
    _, state = peft.convert_to_lora(loha, 2)
    assert len(state) == 4
    ia3 = get_peft_model(BACKBONES["llama"].build(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    config, state = peft.convert_to_lora(few_entries(ia3, 2), 2)
    assert len(state) == 4
    assert config.target_modules == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


def test_a_function_imported_before_this_package():
    """It finds no update in our layers, and says what to import first."""
    model = adapted("llama", low_rank(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(TypeError, match="Import hf_peft_ext before `convert_to_lora`"):
        peft.convert_to_lora.stock(model, 2)


CLASSIFIER = BertConfig(vocab_size=VOCAB, num_labels=3, **PLAIN)
ALONE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
ids = torch.arange(12).view(2, 6)
with torch.no_grad():
    loaded = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(sys.argv[3])
    plain = AutoModelForSequenceClassification.from_pretrained(sys.argv[3]).eval()(input_ids=ids).logits
ours = [name for name in sys.modules if name.startswith("hf_peft_ext")]
print(json.dumps([loaded.tolist(), plain.tolist(), ours, type(merged).__name__]))
"""


def test_in_a_process_with_peft_alone(tmp_path):
    """A classifier with its head: loaded, merged and saved as a plain model without this package."""
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(CLASSIFIER).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, low_rank(task_type="SEQ_CLS"))
    randomise(model)  # the head too
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.arange(12).view(2, 6)).logits
    to_lora(model, tmp_path / "lora", progress=None)
    command = [sys.executable, "-c", ALONE, *(str(tmp_path / name) for name in ("base", "lora", "merged"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    loaded, plain, ours, kind = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(loaded), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(plain), expected, rtol=1e-5, atol=1e-5)
    assert (ours, kind) == ([], "BertForSequenceClassification")


def test_merge_offers_it():
    """The errors of `merge_and_unload` name the way to a LoRA."""
    for config in (METHODS["unipelt"](), LadderConfig(r=4)):
        with pytest.raises(ValueError, match=r"`hf_peft_ext\.to_lora`"):
            adapted("llama", config).merge_and_unload()


def test_refused_arguments(tmp_path):
    model = adapted("llama", low_rank())
    with pytest.raises(TypeError, match="`model` must be a PeftModel, not"):
        to_lora(BACKBONES["llama"].build(), tmp_path)
    with pytest.raises(ValueError, match=r"`r` \(=0\) must be a positive whole number"):
        to_lora(model, tmp_path, r=0)
    with pytest.raises(ValueError, match=r"`adapter_name` \(='other'\) must be one of default"):
        to_lora(model, tmp_path, adapter_name="other")
    with pytest.raises(ValueError, match="must be given with `texts`"):
        to_lora(model, tmp_path, texts=["a text"])
    lora = get_peft_model(BACKBONES["llama"].build(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="is a LoRA already"):
        to_lora(lora, tmp_path)
    prompt = ComposedConfig(placements=[Placement("prompt", "embeddings")], sites={"embeddings": ["embeddings"]})
    with pytest.raises(ValueError, match="has a prompt, which makes the output longer"):
        to_lora(adapted("bert", prompt), tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"has merged adapters; call unmerge_adapter\(\) first"):
        to_lora(model, tmp_path)


def test_an_adapter_that_is_not_active(tmp_path):
    """Another adapter of the model is exported, and the active one stays."""
    model = adapted("llama", low_rank())
    model.add_adapter("second", low_rank())
    randomise(model, "second", seed=1)
    active = outputs("llama", model)
    trained = [p.requires_grad for p in model.parameters()]
    to_lora(model, tmp_path, adapter_name="second", progress=None)
    assert model.active_adapter == "default"
    assert torch.equal(outputs("llama", model), active)
    assert [p.requires_grad for p in model.parameters()] == trained
    model.set_adapter("second")
    loaded = PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path).eval()
    torch.testing.assert_close(outputs("llama", loaded), outputs("llama", model), rtol=1e-5, atol=1e-5)
