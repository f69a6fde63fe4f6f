"""An adapter of a small model, plugged into a large one, before and after folding: equal logits; and against naive
products of its matrices with the projections, layer by layer. A folded LoRA is loaded with peft alone.
"""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_peft_ext import BitFitConfig, BottleneckConfig, LayerPrefixConfig, UniPELTConfig
from hf_peft_ext.transfer import Projections, merge_projections, plug
from hf_peft_ext.transfer.map.projections import Dense, Slice, layer_map, least_squares

from .backbones import BACKBONES, SPECIAL, output
from .methods import randomise

# family -> what makes a large one of it, unlike the small one in depth and width
LARGE = {
    "gpt2": {"n_embd": 48, "n_layer": 5, "n_head": 6},
    "llama": {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5, "num_attention_heads": 6,
              "num_key_value_heads": 3, "head_dim": 8},
    "bert": {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6},
    "t5": {"d_model": 48, "d_ff": 80, "num_layers": 3, "num_decoder_layers": 4, "num_heads": 6, "d_kv": 8},
}  # fmt: skip
LORA = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "t5": ["q", "v", "wo"],
}


def lora_config(**kwargs):
    return LoraConfig(fan_in_fan_out=kwargs["target_modules"][0] == "c_attn", **kwargs)  # as GPT-2's leaves are


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


KINDS = {
    "lora": lambda family: lora_config(r=4, lora_alpha=8, target_modules=LORA[family]),
    "bottleneck": lambda family: BottleneckConfig(style="pfeiffer"),
    "houlsby": lambda family: BottleneckConfig(style="houlsby", r=5),
    "prefix": lambda family: LayerPrefixConfig(num_virtual_tokens=4),
    "unipelt": lambda family: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4),
}
TYPES = {"lora": "LORA", "bottleneck": "BOTTLENECK", "houlsby": "BOTTLENECK", "prefix": "LAYER_PREFIX"}


def small_model(family, kind):
    small = get_peft_model(BACKBONES[family].build(), KINDS[kind](family)).eval()
    randomise(small)
    return small


def plugged_model(family, kind, **kwargs):
    return plug(small_model(family, kind), BACKBONES[family].build(**LARGE[family]), **kwargs).eval()


FAST = {("gpt2", "prefix"), ("llama", "lora"), ("bert", "bottleneck"), ("t5", "lora")}  # every family, most kinds
every_pair = [
    pytest.param(family, kind, marks=[] if (family, kind) in FAST else pytest.mark.slow)
    for family in LARGE
    for kind in KINDS
]


@pytest.mark.parametrize(("family", "kind"), every_pair)
def test_folding_leaves_the_logits(family, kind, tmp_path):
    inputs = BACKBONES[family].inputs()
    model = plugged_model(family, kind)
    with model.disable_adapter(), torch.no_grad():
        base = output(model, inputs)
    with torch.no_grad():
        before = output(model, inputs)
        after = output(merge_projections(model), inputs)
    assert (before - base).abs().max() > 1e-2
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)

    assert not any("parametrizations" in name or "plug" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BACKBONES[family].build(**LARGE[family]), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(again, inputs), after, atol=0, rtol=0)
    if kind in TYPES:
        assert again.active_peft_config.peft_type.value == TYPES[kind]


@pytest.mark.parametrize("order", ["interleaved", "tiled"])
def test_lora_is_the_product_with_the_projections(order):
    """Llama with two layers on five: A' = A W^T and B' = W B of the layer that the map names."""
    small = small_model("llama", "lora")
    projections = Projections()
    large = plug(small, BACKBONES["llama"].build(**LARGE["llama"]), projections, order=order)
    sources = {"interleaved": [0, 0, 0, 1, 1], "tiled": [0, 1, 0, 1, 0]}[order]
    given, found = small.state_dict(), merge_projections(large).state_dict()
    key = "base_model.model.model.layers.{}.{}.lora_{}.default.weight"
    for layer, source in enumerate(sources):
        for path, reads, writes in [
            ("self_attn.q_proj", "residual", f"query_{layer}"),
            ("self_attn.v_proj", "residual", f"value_{layer}"),
            ("self_attn.o_proj", f"heads_{layer}", "residual"),
            ("mlp.down_proj", f"ffn_{layer}", "residual"),
        ]:
            read, write = projections.of[f"{reads}_in"].weight, projections.of[f"{writes}_out"].weight
            a, b = (given[key.format(source, path, side)] for side in "AB")
            torch.testing.assert_close(found[key.format(layer, path, "A")], a @ read.T)
            torch.testing.assert_close(found[key.format(layer, path, "B")], write @ b)


def test_fused_projections_keep_queries_keys_and_values_apart():
    small, projections = small_model("gpt2", "lora"), Projections()
    large = merge_projections(plug(small, BACKBONES["gpt2"].build(**LARGE["gpt2"]), projections))
    key = "base_model.model.transformer.h.{}.attn.c_attn.lora_B.default.weight"
    b, found = small.state_dict()[key.format(1)], large.state_dict()[key.format(4)]
    for i, role in enumerate(["query", "key", "value"]):
        rows = projections.of[f"{role}_4_out"].weight @ b[32 * i : 32 * (i + 1)]
        torch.testing.assert_close(found[48 * i : 48 * (i + 1)], rows)


def test_fused_and_separate_projections_meet():
    """A GPT-2 LoRA on one fused leaf becomes a Llama LoRA on three."""
    small = get_peft_model(BACKBONES["gpt2"].build(), lora_config(r=4, target_modules=["c_attn"]))
    randomise(small)
    large = merge_projections(plug(small, BACKBONES["llama"].build(**LARGE["llama"])))
    assert large.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("kind", ["lora", slow("prefix"), slow("bottleneck")])
def test_a_model_plugged_into_itself_is_the_same(kind):
    """Slices between equal widths are the identity."""
    small = small_model("llama", kind)
    inputs = BACKBONES["llama"].inputs()
    large = plug(small, BACKBONES["llama"].build(), Projections(init="slice")).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(large, inputs), output(small, inputs), atol=1e-6, rtol=1e-6)


def test_classification_head_comes_along(tmp_path):
    def model(**overrides):
        config = AutoConfig.for_model("bert", vocab_size=60, num_labels=3, **{**SPECIAL, **SMALL_BERT, **overrides})
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config)

    SMALL_BERT = BACKBONES["bert"].config
    small = get_peft_model(model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    randomise(small)
    projections = Projections()
    large = merge_projections(plug(small, model(**LARGE["bert"]), projections))
    head, given = (m.base_model.model.classifier.modules_to_save["default"] for m in (large, small))
    torch.testing.assert_close(head.weight, given.weight @ projections.of["residual_in"].weight.T)
    torch.testing.assert_close(head.bias, given.bias)
    large.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model(**LARGE["bert"]), tmp_path)
    torch.testing.assert_close(again.base_model.model.classifier.modules_to_save["default"].weight, head.weight)


def test_what_is_trained_is_narrow():
    """The copies in the small width and W_plug are trained, the large model is not, the small one is left alone."""
    model = plugged_model("llama", "lora")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    a = [
        p for n, p in model.named_parameters() if n.endswith("q_proj.lora_A.default.parametrizations.weight.original")
    ]
    assert [tuple(p.shape) for p in a] == [(4, 32)] * 5
    frozen = plugged_model("llama", "lora", projections=Projections(trainable=False))
    assert {n.rpartition(".")[2] for n, p in frozen.named_parameters() if p.requires_grad} == {"original"}


PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), folder).eval()
    ids = torch.arange(3, 11).unsqueeze(0)
    torch.testing.assert_close(model(ids).logits, torch.load(folder + "/logits.pt"), atol=1e-6, rtol=1e-6)
assert "hf_peft_ext" not in sys.modules
"""


def test_folded_loras_in_a_process_with_peft_alone(tmp_path):
    """One with the same rank and alpha everywhere, one with some layers' own."""
    folders = tmp_path / "plain", tmp_path / "patterns"
    for folder, small in zip(folders, (small_model("llama", "lora"), small_with_patterns()), strict=True):
        model = merge_projections(plug(small, BACKBONES["llama"].build(**LARGE["llama"]))).eval()
        model.save_pretrained(folder)
        with torch.no_grad():
            torch.save(model(torch.arange(3, 11).unsqueeze(0)).logits, folder / "logits.pt")
    BACKBONES["llama"].build(**LARGE["llama"]).save_pretrained(tmp_path / "large")
    names = [str(tmp_path / "large"), *map(str, folders)]
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, *names], check=True, timeout=300)


def small_with_patterns(**kwargs):
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 6},
                "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "layers.0.self_attn.v_proj": 3}}  # fmt: skip
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **patterns, **kwargs)
    small = get_peft_model(BACKBONES["llama"].build(), config).eval()
    randomise(small)
    return small


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_some_layers(tmp_path, rslora):
    """Each layer of the large model has those of its layer in the small one, also when it is folded and loaded."""
    small, inputs = small_with_patterns(use_rslora=rslora), BACKBONES["llama"].inputs()
    model = plug(small, BACKBONES["llama"].build(**LARGE["llama"])).eval()
    with torch.no_grad():
        before = output(model, inputs)
        torch.testing.assert_close(output(merge_projections(model), inputs), before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BACKBONES["llama"].build(**LARGE["llama"]), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(again, inputs), before, atol=1e-5, rtol=1e-5)
    given, *others = (
        {path: (m.r["default"], m.scaling["default"]) for path, m in of.named_modules() if isinstance(m, LoraLayer)}
        for of in (small, model, again)
    )
    key = "base_model.model.model.layers.{}.self_attn.{}"
    layers = enumerate([0, 0, 0, 1, 1])
    wanted = {key.format(i, leaf): given[key.format(j, leaf)] for i, j in layers for leaf in ("q_proj", "v_proj")}
    assert others == [wanted, wanted]
    assert len(set(given.values())) == 4


def test_a_copy_of_a_plugged_model_is_merged_by_itself():
    model, inputs = plugged_model("llama", "lora"), BACKBONES["llama"].inputs()
    with torch.no_grad():
        before = output(model, inputs)
        torch.testing.assert_close(output(merge_projections(deepcopy(model)), inputs), before, atol=1e-5, rtol=1e-5)
        assert torch.equal(output(model, inputs), before)


# Projections


def test_layer_maps():
    assert layer_map([2], [5]) == [0, 0, 0, 1, 1]
    assert layer_map([2], [5], "tiled") == [0, 1, 0, 1, 0]
    assert layer_map([12], [48]) == [i // 4 for i in range(48)]
    assert layer_map([3], [2]) == [0, 1]
    assert layer_map([2, 3], [4, 3]) == [0, 0, 1, 1, 2, 3, 4]  # encoder, then decoder
    assert layer_map([2, 3], [3, 4], "tiled") == [0, 1, 0, 2, 3, 4, 2]


def test_projections_at_the_start():
    x = torch.randn(5, 4)
    dense = Dense(4, 7)
    torch.testing.assert_close(dense.weight.T @ dense.weight, torch.eye(4))
    torch.testing.assert_close(Slice(7, 4)(Slice(4, 7)(x)), x)
    index = torch.tensor([6, 0, 3, 1])
    torch.testing.assert_close(Slice(4, 7, index)(x), torch.zeros(5, 7).index_copy(1, index, x))
    projections = Projections(sides="out")
    assert isinstance(projections.between(("query", 1), "in", 4, 7), Slice)
    assert isinstance(projections.between(("query", 1), "out", 4, 7), Dense)


def test_least_squares_finds_a_linear_map():
    x, weight = torch.randn(200, 6), torch.randn(3, 6)
    found = least_squares(x, x @ weight.T + 5, ridge=1e-9)
    torch.testing.assert_close(found, weight.double(), atol=1e-5, rtol=1e-5)


# Errors


def refuses(message, error, call):
    with pytest.raises(error, match=message):
        call()


def test_a_large_model_with_no_place_stays_as_it_was():
    small = get_peft_model(BACKBONES["llama"].build(), LoraConfig(target_modules=["o_proj", "gate_proj"]))
    large, inputs = BACKBONES["gpt2"].build(), BACKBONES["gpt2"].inputs()
    names = list(large.state_dict())
    refuses("`large` .*has no module for the adapter at .*gate_proj", ValueError, lambda: plug(small, large))
    assert list(large.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(output(large, inputs), output(BACKBONES["gpt2"].build(), inputs))


def test_errors():
    llama = BACKBONES["llama"]
    refuses("`order` .='mixed'. must be one of interleaved, tiled", ValueError, lambda: layer_map([1], [2], "mixed"))
    refuses("`small` .=.1, 2.. must have as many stacks", ValueError, lambda: layer_map([1, 2], [2]))
    refuses("`init` .='zero'. must be one of orthogonal, slice, least", ValueError, lambda: Projections(init="zero"))
    refuses("`sides` .='none'. must be one of both, in, out", ValueError, lambda: Projections(sides="none"))
    refuses("`index` .=2. must hold 4 channels out of 7", ValueError, lambda: Slice(4, 7, torch.arange(2)))
    small = small_model("llama", "lora")
    refuses("`large` must be a model without adapters", TypeError, lambda: plug(small, small))
    for config, message in [
        (LoraConfig(use_dora=True, target_modules=["q_proj"]), "`use_dora` .=True. cannot be carried"),
        (
            LoraConfig(target_modules=["q_proj", "lm_head"]),
            "`target_modules` .='lm_head'. must be a linear leaf of a block",
        ),
        (BitFitConfig(), "holds a Bias at"),
    ]:
        other = get_peft_model(llama.build(), config)
        refuses(message, ValueError, lambda other=other: plug(other, llama.build(**LARGE["llama"])))
    prefix = get_peft_model(llama.build(), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    refuses("an adapter of type PREFIX_TUNING; LORA, BOTTLENECK and", TypeError, lambda: plug(prefix, llama.build()))
    separate = get_peft_model(llama.build(), LoraConfig(target_modules=["q_proj"]))
    refuses("has no leaf where the small", ValueError, lambda: plug(separate, BACKBONES["gpt2"].build()))
