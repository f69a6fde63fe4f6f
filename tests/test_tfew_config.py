"""What a TFewConfig comes to: names of modules against sites found by hand, counts against the paper's, and errors."""

import json
import re

import pytest
import torch
from peft import IA3Config, PeftConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from hf_peft_ext import TFewConfig, load_adapter, registry
from hf_peft_ext.tuners.ia3.target_modules import module_names

from .backbones import BACKBONES, D, output
from .test_errors import state
from .test_tfew import SWITCH, randomise, tuned, vectors

PARTIAL = pytest.mark.filterwarnings("ignore:.*leaves parts of the FFN as they are:UserWarning")
NAMES = {  # target_modules and feedforward_modules
    "distilbert": ({"k_lin", "v_lin", "lin2"}, {"lin2"}),
    "modernbert": ({"Wqkv", "mlp.Wo"}, {"mlp.Wo"}),
    "t5": ({"k", "v", "wo"}, {"wo"}),
    "bart": ({"k_proj", "v_proj", "fc2"}, {"fc2"}),
    "gpt2": ({"c_attn", "mlp.c_proj"}, {"mlp.c_proj"}),
    "gpt_neox": ({"query_key_value", "dense_4h_to_h"}, {"dense_4h_to_h"}),
    "opt": ({"k_proj", "v_proj", "fc2"}, {"fc2"}),
    "llama": ({"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
    "gemma2": ({"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
    "qwen2": ({"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
    "albert": ({"key", "value", "ffn_output"}, {"ffn_output"}),
    "deepseek_v3": ({"kv_b_proj", "down_proj"}, {"down_proj"}),
}


@PARTIAL
@pytest.mark.parametrize("backbone", NAMES)
def test_names(backbone):
    """Short names, the same for models of any depth."""
    depth = {"num_hidden_layers": 4, "n_layers": 4, "num_layers": 4, "n_layer": 4, "encoder_layers": 4}
    for sizes in ({}, {key: n for key, n in depth.items() if key in BACKBONES[backbone].config}):
        config = get_peft_model(BACKBONES[backbone].build(**sizes), TFewConfig()).peft_config["default"]
        assert (config.target_modules, config.feedforward_modules) == NAMES[backbone]
        assert config.fan_in_fan_out == (backbone == "gpt2")


def test_names_that_need_numbers():
    """BERT's attention has an `output.dense` too."""
    config = get_peft_model(BACKBONES["bert"].build(), TFewConfig()).peft_config["default"]
    assert config.feedforward_modules == {"0.output.dense", "1.output.dense"}
    assert config.target_modules == {"key", "value", *config.feedforward_modules}


@pytest.mark.parametrize("n_layers", [12, 30])
def test_names_of_deep_models(n_layers):
    """From ten layers on, numbers end in each other: 10.output.dense in 0.output.dense."""
    model = get_peft_model(BACKBONES["bert"].build(num_hidden_layers=n_layers), TFewConfig())
    ends = ("attention.self.key", "attention.self.value", "output.dense")
    assert set(vectors(model)) == {f"encoder.layer.{i}.{end}" for i in range(n_layers) for end in ends}
    assert {path for path, vector in vectors(model).items() if vector.shape == (1, 64)} == {
        f"encoder.layer.{i}.output.dense" for i in range(n_layers)
    }


@pytest.mark.parametrize("model_type", ["opt", "bart", "gemma", "qwen2", "gptj"])
def test_defaults_of_peft_are_other_sites(model_type):
    """Why TFewConfig is needed: if peft changes its defaults, the documentation has to change too."""
    default = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[model_type]
    assert {"q_proj", "k_proj" if model_type == "opt" else "v_proj"} < set(default)
    assert len(default) == 3  # the FFN is the third


T0 = {
    "T0-3B": ({"d_model": 2048, "num_heads": 32, "d_ff": 5120}, 540_672),
    "T0-11B": ({"d_model": 4096, "num_heads": 64, "d_ff": 10240}, 1_081_344),
}


@pytest.mark.parametrize("name", T0)
def test_parameter_counts_of_the_paper(name):
    """T0's shapes: 24 layers of T5 v1.1, heads of width 64."""
    sizes, expected = T0[name]
    config = AutoConfig.for_model("t5", **sizes, d_kv=64, num_layers=24, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        model = get_peft_model(AutoModelForSeq2SeqLM.from_config(config), TFewConfig(task_type="SEQ_2_SEQ_LM"))
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == expected
    assert model.peft_config["default"].target_modules == {"k", "v", "wo"}


def test_fused_projections_without_data():
    """On the meta device too, the rows of the queries are known."""
    with torch.device("meta"):
        model = get_peft_model(BACKBONES["gpt2"].build(), TFewConfig())
    assert {path: tuple(v.shape) for path, v in vectors(model).items()}["transformer.h.0.attn.c_attn"] == (3 * D, 1)
    model = model.to_empty(device="cpu")
    assert not model.state_dict()["base_model.model.transformer.h.0.attn.c_attn.ia3_l.default"][:D].sub(1).any()


def paths(backbone, config, **sizes):
    return set(vectors(get_peft_model(BACKBONES[backbone].build(**sizes), config)))


def test_layers_to_transform():
    """Encoder before decoder; the names hold numbers only then."""
    leaves = ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    assert paths("llama", TFewConfig(layers_to_transform=1)) == {f"model.layers.1.{leaf}" for leaf in leaves}
    found = paths("llama", TFewConfig(layers_to_transform=[0, 2, 11]), num_hidden_layers=12)
    assert found == {f"model.layers.{i}.{leaf}" for i in (0, 2, 11) for leaf in leaves}
    found = paths("t5", TFewConfig(layers_to_transform=[2], targets=["key"]))
    assert found == {"decoder.block.0.layer.0.SelfAttention.k", "decoder.block.0.layer.1.EncDecAttention.k"}
    model = get_peft_model(BACKBONES["llama"].build(), TFewConfig(layers_to_transform=[1]))
    names = {"1.self_attn.k_proj", "1.self_attn.v_proj", "1.mlp.down_proj"}
    assert model.peft_config["default"].target_modules == names


def test_targets():
    """Some of the sites, and cross-attention alone."""
    model = get_peft_model(BACKBONES["llama"].build(), TFewConfig(targets=["value", "key"]))
    assert model.peft_config["default"].feedforward_modules == set()
    assert {path.rpartition(".")[2] for path in vectors(model)} == {"k_proj", "v_proj"}
    only = {f"decoder.block.{i}.layer.1.EncDecAttention.v" for i in (0, 1)}
    assert paths("t5", TFewConfig(targets=["cross_value"])) == only
    assert paths("llama", TFewConfig(targets=["ffn_output"])) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}


def test_exclude_modules():
    """They stay excluded in the saved config; the names stay short."""
    config = TFewConfig(exclude_modules=r".*layers\.0\..*")
    model = get_peft_model(BACKBONES["llama"].build(), config)
    assert all(path.startswith("model.layers.1.") for path in vectors(model))
    assert model.peft_config["default"].target_modules == {"k_proj", "v_proj", "down_proj"}
    assert paths("llama", TFewConfig(exclude_modules=["mlp.down_proj"])) == paths(
        "llama", TFewConfig(targets=["key", "value"])
    )


def test_modules_to_save(tmp_path):
    """A head is trained beside the vectors and saved; a block that is saved whole gets no vectors."""
    config = AutoConfig.for_model("bert", **BACKBONES["bert"].config, vocab_size=60, num_labels=3)
    model = get_peft_model(AutoModelForSequenceClassification.from_config(config), TFewConfig(task_type="SEQ_CLS"))
    trained = {n.partition(".default")[0] for n, p in model.named_parameters() if p.requires_grad and "ia3_l" not in n}
    assert trained == {"base_model.model.classifier.modules_to_save"}
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    whole = TFewConfig(modules_to_save=["layers.0"])
    assert paths("llama", whole) == paths("llama", TFewConfig(layers_to_transform=[1]))


def test_sites_by_hand():
    """For structures that are not understood: where the keys, the values and the inner activation are."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            return self.d(self.a(x) + self.b(x) * self.c(x))

    message = "Architecture 'Odd' has no attention blocks in which `(IA)^3` could be placed; leave it out or"
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(Odd(), TFewConfig())
    config = TFewConfig(sites={"key": ["a"], "value": "b", "ffn_output": ["d"]})
    model = get_peft_model(Odd(), config)
    assert {path: tuple(v.shape) for path, v in vectors(model).items()} == {"a": (6, 1), "b": (6, 1), "d": (1, 6)}


SMALL = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
BESIDE = {  # model type -> config, and the FFN's output leaves in a layer, beside which stand others
    "gemma4_text": ({"head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 2, "hidden_size_per_layer_input": 8,
                     "vocab_size_per_layer_input": 60, "num_kv_shared_layers": 0}, ["mlp.down_proj"]),
    "falcon_h1": ({"num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
                   "mamba_d_state": 8, "mamba_n_groups": 1}, ["feed_forward.down_proj"]),
    "qwen2_moe": ({"num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24,
                   "shared_expert_intermediate_size": 40}, ["mlp.shared_expert.down_proj"]),
    "mobilebert": ({"hidden_size": 64, "intra_bottleneck_size": 32, "embedding_size": 32},
                   [*(f"ffn.{i}.output.dense" for i in range(3)), "output.dense"]),
}  # fmt: skip


@PARTIAL
@pytest.mark.parametrize("model_type", BESIDE)
def test_what_stands_beside_the_ffn(model_type):
    """Gemma's inputs of each layer, Falcon's Mamba, gates of experts and bottlenecks are not the FFN's output."""
    sizes, expected = BESIDE[model_type]
    config = AutoConfig.for_model(model_type, **{**SMALL, **sizes})
    model = get_peft_model(AutoModel.from_config(config), TFewConfig(targets=["ffn_output"]))
    layers = {re.sub(r".*?layers?\.\d+\.", "", path) for path in vectors(model)}
    assert layers == set(expected)
    assert len(vectors(model)) == 2 * len(expected)


def test_experts():
    """Experts that are one tensor: partly adapted with a warning, or an error where nothing is left."""
    message = "(IA)^3 leaves parts of the FFN as they are: model.layers.1.mlp.experts."
    with pytest.warns(UserWarning, match=re.escape(message)):
        get_peft_model(BACKBONES["deepseek_v3"].build(), TFewConfig())
    found = paths("deepseek_v3", TFewConfig(layers_to_transform=[0]))  # without a warning
    assert "model.layers.0.mlp.down_proj" in found
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mixtral", **sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=20)
    model = AutoModelForCausalLM.from_config(config)
    before = state(model)
    message = "Architecture 'mixtral' has no place for `(IA)^3` at `ffn_output`; leave it out or pass `sites=`."
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, TFewConfig())
    assert state(model) == before
    get_peft_model(model, TFewConfig(targets=["key", "value"]))


def test_linear_experts():
    """Experts that are linear modules each get vectors of their own."""
    config = AutoConfig.for_model("switch_transformers", **SWITCH)
    model = get_peft_model(AutoModelForSeq2SeqLM.from_config(config), TFewConfig())
    experts = {path.rpartition("experts.")[2] for path in vectors(model) if "experts" in path}
    assert experts == {f"expert_{i}.wo" for i in range(3)}


BAD_CONFIGS = [
    ({"target": ["key"]}, "`target` (=['key']) is not a field of TFewConfig; did you mean `targets`?"),
    ({"targets": ["query"]}, "`targets` (=['query']) must hold key, value, ffn_output, cross_key, cross_value only."),
    ({"targets": []}, "`targets` (=[]) must hold at least one name."),
    ({"targets": "key"}, "`targets` (='key') must be a list of names, not a single string."),
    ({"target_modules": ["k"]}, "`target_modules` (=['k']) must be None: TFewConfig finds the modules"),
    ({"feedforward_modules": ["wo"]}, "`feedforward_modules` (=['wo']) must be None"),
    ({"layers_to_transform": [-1]}, "`layers_to_transform` (=[-1]) must be a layer index or a list of them, 0 or"),
    ({"sites": {"query": ["q"]}}, "`sites` (='query') must name targets: key, value, ffn_output, cross_key,"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS, ids=[message[:30] for _, message in BAD_CONFIGS])
def test_bad_config(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TFewConfig(**fields)


BAD_INJECTIONS = [
    ("llama", {"layers_to_transform": [0, 2]}, "`layers_to_transform` (=[0, 2]) names layer 2, which does not exist;"),
    ("llama", {"targets": ["cross_key"]}, "Architecture 'llama' has no place for `(IA)^3` at `cross_key`; leave it"),
    ("t5", {"targets": ["cross_key"], "layers_to_transform": [0]}, "`layers` (=[0]) holds no layer of this model wh"),
    (
        "llama",
        {"exclude_modules": r"model\.layers\..*"},
        "`exclude_modules` (='model\\\\.layers\\\\..*') and `modules_to_s",
    ),
    ("llama", {"sites": {"key": ["kk"]}}, "`sites` (={'key': ['kk']}) matches no module of LlamaForCausalLM."),
    ("llama", {"sites": {"key": ["mlp"]}}, "model.layers.0.mlp is a LlamaMLP, which peft's (IA)^3 cannot scale;"),
    (
        "llama",
        {"sites": {"key": ["down_proj"]}},
        "`sites` (={'key': ['down_proj']}) puts `ffn_output` and another target at model.layers.0.mlp.dow",
    ),
]


@pytest.mark.parametrize(("backbone", "fields", "message"), BAD_INJECTIONS)
def test_bad_injection_leaves_the_model_alone(backbone, fields, message):
    model = BACKBONES[backbone].build()
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, TFewConfig(**fields))
    assert state(model) == before
    model = get_peft_model(model, TFewConfig())
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.add_adapter("other", TFewConfig(**fields))
    assert state(model) == before
    assert list(model.peft_config) == ["default"]


def test_is_not_saved_without_a_model(tmp_path):
    """An adapter_config.json without names would be filled in with other sites by peft."""
    with pytest.raises(ValueError, match="A TFewConfig names no modules before it is on a model; save the PeftModel"):
        TFewConfig().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_saved(tmp_path):
    """adapter_config.json names modules as a person would, and is read by peft as its own."""
    model, inputs = tuned("opt")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["fc2", "k_proj", "v_proj"]
    assert saved["feedforward_modules"] == ["fc2"]
    assert type(PeftConfig.from_pretrained(tmp_path)) is IA3Config
    again = load_adapter(BACKBONES["opt"].build(), tmp_path)  # with the checks for an untrusted adapter
    with torch.no_grad():
        assert torch.equal(output(again.eval(), inputs), output(model, inputs))


def test_weighted_adapters():
    """peft adds adapters of equal names; ours have them."""
    model, _ = tuned("llama")
    model.add_adapter("other", TFewConfig())
    randomise(model, "other", seed=5)
    model.add_weighted_adapter(["default", "other"], [0.25, 0.75], "mean")
    for path, vector in vectors(model, "mean").items():
        expected = 0.25 * vectors(model)[path] + 0.75 * vectors(model, "other")[path]
        torch.testing.assert_close(vector, expected)


def test_a_tuner_of_another_package_is_not_replaced(monkeypatch):
    class Foreign(nn.Module):
        pass

    monkeypatch.setitem(registry.PEFT_TYPE_TO_TUNER_MAPPING, registry.PeftType.IA3, Foreign)
    from hf_peft_ext.tuners.ia3.tuner import IA3Model

    with pytest.raises(RuntimeError, match=r"`peft_type` \(='IA3'\) has a tuner of another package, tests"):
        registry.replace_tuner(registry.PeftType.IA3, IA3Model)


# Names of modules on their own: outputs, inputs, others -> what selects them.
CASES = [
    (["a.0.k", "a.1.k"], ["a.0.o", "a.1.o"], ["a.0.q"], ({"k", "o"}, {"o"})),
    (["a.0.k"], ["a.0.o"], ["a.1.k", "a.1.o"], ({"0.k", "0.o"}, {"0.o"})),
    (["a.0.k", "a.2.k"], [], ["a.1.k"], ({"0.k", "2.k"}, set())),
    (["a.0.x.k", "a.1.x.k"], [], ["a.0.y.k"], ({"x.k"}, set())),
    (["a.k_proj"], ["b.proj"], [], ({"k_proj", "proj"}, {"b.proj"})),  # peft ends k_proj with proj
]


@pytest.mark.parametrize(("outputs", "inputs", "others", "expected"), CASES)
def test_module_names(outputs, inputs, others, expected):
    assert module_names(outputs, inputs, others) == expected
