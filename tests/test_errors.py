"""Bad input: the error names the field, the value and the rule, and nothing has changed."""

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_peft_ext import (
    BitFitConfig,
    BottleneckConfig,
    ComposedConfig,
    LayerPrefixConfig,
    MAMConfig,
    Placement,
    UniPELTConfig,
)

from .backbones import BACKBONES, output
from .methods import METHODS

BAD_CONFIGS = [
    (lambda: UniPELTConfig(bottleneck_siz=3), "`bottleneck_siz` (=3) is not a field of UniPELTConfig; did you mean"),
    (lambda: UniPELTConfig(r=-1), "`r` (=-1) must be a positive whole number."),
    (lambda: UniPELTConfig(r=True), "`r` (=True) must be a positive whole number."),
    (lambda: UniPELTConfig(lora_alpha=float("inf")), "`lora_alpha` (=inf) must be a positive number."),
    (lambda: UniPELTConfig(lora_dropout=1.0), "`lora_dropout` (=1.0) must lie in [0, 1)."),
    (lambda: UniPELTConfig(methods=()), "`methods` (=()) must hold at least one name."),
    (lambda: UniPELTConfig(methods=("lora", "lora")), "`methods` (=('lora', 'lora')) must hold a name once."),
    (lambda: UniPELTConfig(methods=("loar",)), "`methods` (=('loar',)) must hold adapter, prefix, lora, bitfit only."),
    (lambda: UniPELTConfig(methods=("bitfit",)), "`gated` (=True) needs a sub-layer that can be gated"),
    (lambda: UniPELTConfig(gate_pooling="max"), "`gate_pooling` (='max') must be"),
    (lambda: UniPELTConfig(init="zero"), "`init` (='zero') must be one of base, paper."),
    (
        lambda: UniPELTConfig(gate_init={"loar": 1.0}),
        "`gate_init` (={'loar': 1.0}) must have the keys adapter, prefix,",
    ),
    (lambda: UniPELTConfig(gate_init={"lora": "x"}), "`gate_init` (={'lora': 'x'}) must be a number, or one for each"),
    (lambda: UniPELTConfig(gate_init=float("nan")), "`gate_init` (=nan) must be a number, or one for each sub-layer."),
    (lambda: UniPELTConfig(gate_init=1.0, gated=False), "`gate_init` (=1.0) must be None without gates."),
    (
        lambda: UniPELTConfig(gate_init={"prefix": 1.0}, methods=("lora",)),
        "`gate_init` (={'prefix': 1.0}) must have the keys lora only.",
    ),
    (lambda: Placement("low_rank", "query", gate_init="x"), "`gate_init` (='x') must be a number."),
    (lambda: Placement("prefix", "attention", options={"form": "own"}), "`form` (='own') must be one of separate,"),
    (
        lambda: Placement("prefix", "attention", options={"form": "separate", "shift_positions": True}),
        "`form` (='separate') must be 'joint' with `shift_positions`.",
    ),
    (lambda: UniPELTConfig(lora_targets=("quary",)), "`lora_targets` (=('quary',)) must hold query, key, value,"),
    (lambda: UniPELTConfig(bias="all"), "`bias` (='all') must be \"none\"; BitFitConfig trains biases."),
    (lambda: UniPELTConfig(target_parameters=["x"]), "`target_parameters` (=['x']) must be None"),
    (lambda: UniPELTConfig(bottleneck_size=0), "`bottleneck_size` (=0) must be a positive whole number."),
    (lambda: UniPELTConfig(methods="lora"), "`methods` (='lora') must be a list of names, not a single string."),
    (lambda: UniPELTConfig(lora_targets=()), "`lora_targets` (=()) must hold at least one name."),
    (
        lambda: UniPELTConfig(layers_to_transform=["0"]),
        "`layers_to_transform` (=['0']) must be a layer index or a list",
    ),
    (lambda: UniPELTConfig(layers_to_transform=[]), "`layers_to_transform` (=[]) must be a layer index or a list"),
    (lambda: MAMConfig(bottleneck_size=0), "`bottleneck_size` (=0) must be a positive whole number."),
    (lambda: Placement("low_rank", "query", options={"r": None}), "`r` (=None) must be a positive whole number."),
    (
        lambda: Placement("bottleneck", "after_ffn", options={"r": 1, "init": -1.0}),
        '`init` (=-1.0) must be a number of 0 or more, or "lora".',
    ),
    (
        lambda: Placement("prefix", "attention", options={"num_virtual_tokens": None}),
        "`num_virtual_tokens` (=None) must be a positive whole number.",
    ),
    (lambda: LayerPrefixConfig(num_virtual_tokens=0), "`num_virtual_tokens` (=0) must be a positive whole number."),
    (
        lambda: LayerPrefixConfig(prefix_projection=True, encoder_hidden_size=0),
        "`encoder_hidden_size` (=0) must be a positive whole number.",
    ),
    (lambda: BottleneckConfig(style="phfeiffer"), "`style` (='phfeiffer') must be one of houlsby, pfeiffer,"),
    (
        lambda: BottleneckConfig(r=8, reduction_factor=16),
        "`r` (=8) must be given, or else `reduction_factor`, and not",
    ),
    (lambda: BottleneckConfig(reduction_factor=-2.0), "`reduction_factor` (=-2.0) must be a positive number."),
    (lambda: BottleneckConfig(activation="relux"), "`activation` (='relux') must be an activation of transformers."),
    (lambda: BottleneckConfig(scaling="learn"), "`scaling` (='learn') must be a number or \"learned\"."),
    (lambda: BitFitConfig(target_modules=["q"]), "`target_modules` (=['q']) names leaves for a low-rank branch"),
    (lambda: UniPELTConfig(sites={"qury": ["q"]}), "`sites` (='qury') must name sites: after_attention,"),
    (lambda: MAMConfig(scaling=float("nan")), "`scaling` (=nan) must be a number"),
    (lambda: ComposedConfig(), "`placements` (=[]) must hold at least one placement."),
    (lambda: ComposedConfig(placements=[{"sublayer": "bias"}]), "must have `sublayer` and `site`"),
    (lambda: Placement("lowrank", "query"), "`sublayer` (='lowrank') must be one of bottleneck, low_rank, prefix,"),
    (lambda: Placement("prefix", "query"), "`site` (='query') must be a site of `prefix`: attention."),
    (lambda: Placement("bias", "bias", gate="mean"), "`gate` (='mean') must be None: a bias reads no input."),
    (lambda: Placement("low_rank", "query", gate="yes"), "`gate` (='yes') must be None or"),
    (lambda: Placement("low_rank", "query", layers=[-1]), "`layers` (=-1) must hold layer indices of 0 or more."),
    (lambda: Placement("low_rank", "query", options={"rank": 1}), "`options` of `low_rank` has no `rank`; it has r,"),
]


@pytest.mark.parametrize(("make", "message"), BAD_CONFIGS, ids=[message[:40] for _, message in BAD_CONFIGS])
def test_bad_config(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_placements_of_a_wrong_kind():
    with pytest.raises(TypeError, match="`placements` must hold placements or dictionaries, not int"):
        ComposedConfig(placements=[3])


def state(model):
    """All that an injection could change."""
    return (
        [(n, p.requires_grad, p.sum().item()) for n, p in model.named_parameters()],
        [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        [id(getattr(m, "config", None)) for m in model.modules()],
    )


BAD_INJECTIONS = [
    (
        "bert",
        lambda: UniPELTConfig(layers_to_transform=[0, 5]),
        "`layers_to_transform` (=[0, 5]) names layer 5, which",
    ),
    (
        "bert",
        lambda: ComposedConfig(placements=[Placement("prefix", "attention", layers=[2])]),
        "`layers` (=[2]) names layer 2, which does not exist; this model has layers 0 to 1.",
    ),
    ("llama", lambda: UniPELTConfig(target_modules=["qproj"]), "`target_modules` (=['qproj']) matches no linear leaf"),
    (
        "llama",
        lambda: UniPELTConfig(sites={"query": ["qq"]}),
        "`sites` (={'query': ['qq']}) matches no module of Llama",
    ),
    ("llama", lambda: UniPELTConfig(sites={"query": ["mlp.act_fn"]}), "which has no linear leaf to take widths from"),
    ("llama", lambda: UniPELTConfig(sites={"attention": ["mlp"]}), "names model.layers.0.mlp, which takes no prefix"),
    (
        "bert",
        lambda: UniPELTConfig(modules_to_save=["LayerNorm"]),
        "`modules_to_save` (=['LayerNorm']) holds every place of `bottleneck` at `after_residual`",
    ),
    ("bert", lambda: MAMConfig(modules_to_save=["intermediate"]), "`modules_to_save` (=['intermediate']) holds every"),
    (
        "llama",
        lambda: LayerPrefixConfig(exclude_modules=r".*self_attn"),
        "`exclude_modules` (='.*self_attn') leaves no site",
    ),
    (
        "bert",
        lambda: ComposedConfig(placements=[Placement("low_rank", "ffn_gate")]),
        "Architecture 'bert' has no place for `low_rank` at `ffn_gate`; leave it out or pass `sites=`.",
    ),
    (
        "bert",
        lambda: ComposedConfig(placements=[Placement("bias", "bias"), Placement("bias", "bias")]),
        "`placements` put `bias` at `bias` of embeddings.LayerNorm twice.",
    ),
]


@pytest.mark.parametrize(("backbone", "make", "message"), BAD_INJECTIONS)
def test_bad_injection_leaves_the_model_alone(backbone, make, message):
    model = BACKBONES[backbone].build()
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, make())
    assert state(model) == before


def test_architecture_without_attention():
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    before = state(model)
    message = "Architecture 'mamba' has no attention blocks in which `prefix` could be placed; "
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, UniPELTConfig())
    assert state(model) == before


def test_a_failure_in_the_middle_is_rolled_back(monkeypatch):
    """Whatever fails after the first sub-layer is attached, the model and its adapters are as before."""
    from hf_peft_ext.attach import tuner as composed

    family = BACKBONES["bert"]
    model = get_peft_model(family.build(), UniPELTConfig(bottleneck_size=4)).eval()
    before, build, calls = state(model), composed.build, []

    def failing(placement, site, projections):
        calls.append(site)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return build(placement, site, projections)

    monkeypatch.setattr(composed, "build", failing)
    with torch.no_grad():
        expected = output(model, family.inputs())
        for name in ("second", "third"):
            calls.clear()
            with pytest.raises(RuntimeError, match="out of memory"):
                model.add_adapter(
                    name, UniPELTConfig(methods=("adapter", "prefix", "lora", "bitfit"), bottleneck_size=4)
                )
        assert state(model) == before
        assert list(model.peft_config) == ["default"]
        assert torch.equal(output(model, family.inputs()), expected)


# peft warns of names that are a part of "sublayer_", as it does of "r" for LoRA; they work
@pytest.mark.filterwarnings("ignore:Adapter name '.' should not be contained in the prefix:UserWarning")
@pytest.mark.parametrize("name", ["A", "b", "gate", "model", "base_model", "down", "encoder", "0", "my adapter (2)"])
def test_adapter_called_like_a_part_of_the_model(name, tmp_path):
    """Such names are allowed, as with LoRA: alone or beside another adapter, it is saved and loaded whole."""
    family, config = BACKBONES["bert"], METHODS["unipelt_aplb"]
    model = get_peft_model(family.build(), config(), adapter_name=name)
    model.add_adapter("other", config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".sublayer_of." in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / name / "adapter_model.safetensors").stat().st_size == (
        (tmp_path / "other" / "adapter_model.safetensors").stat().st_size
    )
    for adapter in (name, "other"):
        model.set_adapter(adapter)
        expected = output(model, family.inputs())
        for again in (name, "third"):
            loaded = PeftModel.from_pretrained(family.build(), tmp_path / adapter, adapter_name=again).eval()
            assert torch.equal(output(loaded, family.inputs()), expected)


@pytest.mark.parametrize("name", ["a.b", "../x", "a/b", "a\\b", "a\nb", "x" * 201, "keys", "forward"])
def test_names_that_no_adapter_can_have(name):
    model = BACKBONES["bert"].build()
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(f"`adapter_name` (={name!r})")):
        get_peft_model(model, UniPELTConfig(), adapter_name=name)
    assert state(model) == before


def test_bad_adapter_names_in_a_batch():
    family = BACKBONES["bert"]
    model = get_peft_model(family.build(), UniPELTConfig(bottleneck_size=4))
    with pytest.raises(ValueError, match="`adapter_names` can be passed for inference only"):
        model.train()(**family.inputs(), adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match=re.escape("`adapter_names` holds ['x'], but the adapters are ['default']")):
        model.eval()(**family.inputs(), adapter_names=["default", "x", "__base__"])
    for names in (["default", "__base__"], [], ["default"]):
        message = f"`adapter_names` (={names!r}) must have one name for each of the 3 rows"
        with pytest.raises(ValueError, match=re.escape(message)):
            model.eval()(**family.inputs(), adapter_names=names)


def test_loading_on_a_model_of_another_size(tmp_path):
    """The error names the tensor, and both shapes."""
    get_peft_model(BACKBONES["bert"].build(), UniPELTConfig(bottleneck_size=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has shape .*, but its config implies"):
        PeftModel.from_pretrained(BACKBONES["bert"].build(hidden_size=16), tmp_path)
