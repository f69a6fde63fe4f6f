"""load_adapter: what stock peft loads well it loads with equal logits, from a folder and from the Hub; no copy of the
model is made.
"""

import copy

import pytest
import torch
from huggingface_hub import upload_file
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig, PeftModel, PeftModelForSequenceClassification, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

from hf_peft_ext import UniPELTConfig, load_adapter
from hf_peft_ext.hub_cards import push_adapter
from hf_peft_ext.loading import expected_tensors

from .backbones import BACKBONES, SPECIAL, VOCAB, output
from .hub_server import STRANGER
from .methods import METHODS, randomise
from .saved_adapters import (
    CONFIG,
    EXPECTED_WARNINGS,
    STOCK_METHODS,
    WEIGHTS,
    Largest,
    assert_equal_to_stock,
    fingerprint,
    refused,
    reweigh,
    rewrite,
    saved,
)

pytestmark = EXPECTED_WARNINGS


@pytest.mark.parametrize("backbone", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_our_methods(method, backbone, tmp_path):
    assert_equal_to_stock(saved(tmp_path, METHODS[method](), backbone), BACKBONES[backbone])


@pytest.mark.parametrize("method", STOCK_METHODS)
def test_stock_methods(method, tmp_path):
    assert_equal_to_stock(saved(tmp_path, STOCK_METHODS[method]()), BACKBONES["llama"])


def test_modules_to_save_of_ours(tmp_path):
    config = METHODS["unipelt"](modules_to_save=["pooler"], trainable_token_indices=[3, 4])
    assert_equal_to_stock(saved(tmp_path, config, "bert"), BACKBONES["bert"])


@pytest.mark.parametrize("make", [METHODS["unipelt"], LoraConfig], ids=["unipelt", "lora"])
def test_a_classifier(make, tmp_path):
    """With a task type, peft saves the head too, on its own account."""
    tiny = AutoConfig.for_model("bert", vocab_size=VOCAB, num_labels=2, **SPECIAL, **BACKBONES["bert"].config)
    base = AutoModelForSequenceClassification.from_config(tiny)
    bases = [copy.deepcopy(base) for _ in range(2)]
    model = get_peft_model(base, make(task_type="SEQ_CLS"))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded, inputs = load_adapter(bases[0], tmp_path), BACKBONES["bert"].inputs()
    with torch.no_grad():
        assert torch.equal(output(loaded, inputs), output(PeftModel.from_pretrained(bases[1], tmp_path), inputs))
    assert type(loaded) is PeftModelForSequenceClassification
    assert any("classifier" in key for key in load_file(tmp_path / WEIGHTS))


def test_a_second_adapter(tmp_path):
    """A PeftModel gets a further adapter, of ours or of peft's, with the logits that stock peft gives."""
    family, inputs = BACKBONES["llama"], BACKBONES["llama"].inputs()
    for name, make in {"ours": METHODS["unipelt"], "stock": STOCK_METHODS["lora_pattern"]}.items():
        saved(tmp_path / name, make())
        model, stock = (get_peft_model(family.build(), make()).eval() for _ in range(2))
        stock.load_adapter(tmp_path / name, "second")
        assert load_adapter(model, tmp_path / name, "second") is model
        for adapted in (model, stock):
            adapted.set_adapter("second")
        with torch.no_grad():
            assert torch.equal(output(model, inputs), output(stock, inputs))
        with pytest.raises(ValueError, match="`adapter_name` \\(='second'\\) is taken"):
            load_adapter(model, tmp_path / name, "second")


def test_is_trainable(tmp_path):
    model = load_adapter(BACKBONES["llama"].build(), saved(tmp_path, METHODS["unipelt"]()), is_trainable=True)
    assert all(p.requires_grad == (".sublayer_of." in name) for name, p in model.named_parameters())
    load_adapter(model, tmp_path, "second", is_trainable=True)
    assert all(p.requires_grad == (".sublayer_of." in name) for name, p in model.named_parameters())
    saved(tmp_path / "prompt", STOCK_METHODS["prompt_tuning"]())
    refused(tmp_path / "prompt", "`is_trainable` .* must be False", is_trainable=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype, tmp_path):
    """A file in half or double precision, and a model: as in stock peft."""
    for config in (METHODS["unipelt"](), STOCK_METHODS["lora"]()):
        saved(tmp_path, config)
        reweigh(tmp_path, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
        stock = PeftModel.from_pretrained(BACKBONES["llama"].build().to(dtype), tmp_path)
        loaded = load_adapter(BACKBONES["llama"].build().to(dtype), tmp_path)
        kinds = {name: p.dtype for name, p in stock.named_parameters()}
        assert {name: p.dtype for name, p in loaded.named_parameters()} == kinds
        for name, parameter in stock.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name


@pytest.mark.parametrize("method", ["unipelt", "lora", "lora_dora", "prompt_tuning"])
def test_four_bit(method, tmp_path):
    """A backbone in 4 bits: as in stock peft, and unchanged after a refusal."""
    pytest.importorskip("bitsandbytes")
    family = BACKBONES["llama"]
    wide = {"hidden_size": 64, "intermediate_size": 128}
    family.build(**wide).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    bases = [
        type(family.build()).from_pretrained(tmp_path / "base", quantization_config=quantised, device_map={"": "cpu"})
        for _ in range(3)
    ]
    model = get_peft_model(bases[0], {**METHODS, **STOCK_METHODS}[method]())
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded, stock = (
        load_adapter(bases[1], tmp_path / "adapter"),
        PeftModel.from_pretrained(bases[2], tmp_path / "adapter"),
    )
    with torch.no_grad():
        assert torch.equal(output(loaded, family.inputs()), output(stock, family.inputs()))


def test_from_a_subfolder(tmp_path):
    saved(tmp_path / "inner", METHODS["mam"]())
    assert list(load_adapter(BACKBONES["llama"].build(), tmp_path, subfolder="inner").peft_config) == ["default"]
    for outside in ("../inner", "/inner"):
        refused(tmp_path / "inner", "`subfolder` .* must lie inside", subfolder=outside)


# The Hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The Hub's cache with one repository of two commits: main is the newer one, v1 the older."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--someone--adapter"
    (repo / "refs").mkdir(parents=True)
    commits = {"v1": "1" * 40, "main": "2" * 40}
    for bottleneck_size, (name, commit) in enumerate(commits.items(), 3):
        (repo / "refs" / name).write_text(commit)
        saved(repo / "snapshots" / commit, UniPELTConfig(bottleneck_size=bottleneck_size, num_virtual_tokens=4))
    return commits


@pytest.mark.parametrize("revision", [None, "main", "v1", "1" * 40])
def test_pinned_revision(hub_cache, revision):
    """The revision that is asked for is loaded, and its commit is noted."""
    config = load_adapter(BACKBONES["llama"].build(), "someone/adapter", revision=revision).peft_config["default"]
    commit = hub_cache.get(revision or "main", revision)
    assert config.adapter_revision == commit
    assert config.bottleneck_size == (3 if commit == hub_cache["v1"] else 4)


# 2026-11: huggingface_hub 2.4 gives httpx2 the bytes of LFS files by an old name
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_over_http(hub, tmp_path):
    """From a private repository: the pinned commit, and of its files the two that are needed."""
    commits = {}
    for r in (2, 3):
        saved(tmp_path / str(r), METHODS["unipelt"](r=r))
        commits[r] = push_adapter(tmp_path / str(r), "ann/adapter", private=True).oid
    upload_file(path_or_fileobj=b"print(1)", path_in_repo="modeling.py", repo_id="ann/adapter")
    upload_file(path_or_fileobj=b"pickle", path_in_repo="adapter_model.bin", repo_id="ann/adapter")
    hub.log.clear()
    for revision, r in ((None, 3), (commits[2], 2), (commits[3], 3)):
        config = load_adapter(BACKBONES["llama"].build(), "ann/adapter", revision=revision).peft_config["default"]
        assert config.r == r
        assert config.adapter_revision == (revision or hub.repos["ann/adapter"].refs["main"])
    fetched = {line.split()[1].rpartition("/")[2] for line in hub.log if line.startswith("GET /ann/adapter/resolve")}
    assert fetched == {CONFIG, WEIGHTS}
    with pytest.raises(RevisionNotFoundError):
        load_adapter(BACKBONES["llama"].build(), "ann/adapter", revision="nope")
    with pytest.raises(RepositoryNotFoundError):
        load_adapter(BACKBONES["llama"].build(), "ann/adapter", revision=commits[2][:8], token=STRANGER)


def test_revision_of_a_folder(tmp_path):
    saved(tmp_path, METHODS["mam"]())
    refused(tmp_path, "`revision` \\(='v1'\\) must be None: a local folder has no revisions.", revision="v1")


# An adapter is built once, on the model itself


@pytest.mark.parametrize("method", [*METHODS, "lora", "lora_ranks", "lora_modules_to_save", "ia3"])
@pytest.mark.parametrize("further", [False, True], ids=["first", "second"])
def test_no_copy_of_the_model_is_made(method, further, tmp_path, monkeypatch):
    """What takes longest; a head that is larger than the file is copied without data first, as LM heads may be."""
    make = {**METHODS, **STOCK_METHODS}[method]
    saved(tmp_path, make())
    model = get_peft_model(BACKBONES["llama"].build(), make()) if further else BACKBONES["llama"].build()

    def fail(*_):
        raise AssertionError("a copy was made")

    monkeypatch.setattr(expected_tensors, "copy_without_data", fail)
    load_adapter(model, tmp_path, "second")


@pytest.mark.parametrize("method", ["unipelt", "composed", "lora", "ia3"])
@pytest.mark.parametrize("further", [False, True], ids=["first", "second"])
def test_a_refusal_after_building_puts_all_back(method, further, tmp_path):
    """The adapter was built without data already; modules, hooks, logits and the adapters' names are back."""
    make, family = {**METHODS, **STOCK_METHODS}[method], BACKBONES["llama"]
    saved(tmp_path, make())
    model = get_peft_model(family.build(), make()).eval() if further else family.build()
    with torch.no_grad():
        logits = output(model, family.inputs())  # first: it may leave marks of its own
        before = fingerprint(model)
        modules = [id(module) for module in model.modules()]
        for change in (lambda t: t.pop(sorted(t)[0]), lambda t: t.clear()):
            reweigh(tmp_path, change)
            with pytest.raises(ValueError, match=r"lacks tensors"):
                load_adapter(model, tmp_path, "second")
            assert [id(module) for module in model.modules()] == modules
            assert fingerprint(model) == before
            assert torch.equal(output(model, family.inputs()), logits)
    saved(tmp_path, make())
    assert list(load_adapter(model, tmp_path, "second").peft_config) == ["default"] * further + ["second"]


def test_a_head_that_the_file_cannot_hold_is_not_copied(tmp_path):
    """Copying modules with their data would allocate what a config asks for."""
    saved(tmp_path, STOCK_METHODS["lora"]())
    rewrite(tmp_path, modules_to_save=["mlp"])
    base = BACKBONES["llama"].build()
    with pytest.raises(ValueError, match=r"lacks tensors: .*mlp"), Largest() as ours:
        load_adapter(base, tmp_path)
    assert ours.numel < base.model.layers[0].mlp.up_proj.weight.numel()


@pytest.mark.parametrize("method", ["unipelt", "lora_branch"])
def test_what_the_file_does_not_hold(method, tmp_path):
    """Which rows of a fused projection a branch acts on is no tensor of the file, and has its values nevertheless."""
    assert_equal_to_stock(saved(tmp_path, METHODS[method](), "gpt2"), BACKBONES["gpt2"])
